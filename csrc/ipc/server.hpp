// The exporting side: a thread that hands descriptors of shared runs to whoever shows a handle's token.
//
// It starts with the first share and ends with the process; a child of fork() has none, and none of its
// sockets. It answers processes of the same user alone, blocks on no peer, takes no signal and never the GIL.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "alloc/heap.hpp"
#include "alloc/malloc.hpp"

namespace tem::ipc {

/// Lets other processes of this user map the extents under a live block until it is freed. Error{kInvalid}
/// for a pointer that is no live block, Error{kDriver} where the device or the system cannot.
SharedBlock share(const std::shared_ptr<Heap>& heap, const void* block);

}  // namespace tem::ipc
