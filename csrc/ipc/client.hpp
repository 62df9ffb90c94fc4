// The importing side: maps what another process shared.
#pragma once

#include <memory>
#include <string>

#include "arena/handles.hpp"

namespace tem::ipc {

/// Maps the memory behind a handle side by side, accessible by the device and its peers. Who holds the same
/// handle open shares the mapping. It is charged to nobody. The last owner's end unmaps it once all that was
/// submitted on the device has run: it waits for that some seconds, and otherwise leaves it to a later call.
///
/// Error{kInvalid} for a handle that is none, or of another device; Error{kClosed} if its process has ended
/// or freed the block; Error{kDriver} where a driver or the system refuses, or no answer comes in seconds.
std::shared_ptr<void> open(Device& device, const std::string& handle);

/// Opens all that is open on a device to its peers.
void allow_again(Device& device);

}  // namespace tem::ipc
