// Memory of other processes on its way out: unmapped when the device has done with it.
#pragma once

#include <functional>
#include <memory>

#include "arena/imported.hpp"

namespace tem::ipc {

/// Unmaps memory once all that was submitted on the device has run, and calls `then`. It waits for that some
/// seconds, and otherwise leaves it to a later call. In a child of fork() it does nothing: the mapping is the
/// parent's.
void unmap_behind(std::unique_ptr<Imported> memory, std::shared_ptr<Device> device,
                  std::function<void()> then = {}) noexcept;

/// Unmaps what was left by earlier calls and can go now.
void unmap_what_was_left();

}  // namespace tem::ipc
