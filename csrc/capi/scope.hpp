// Which account a thread's allocations are charged to.
#pragma once

#include <memory>

#include "alloc/heap.hpp"
#include "capi/tem.h"

namespace tem {

/// Charges this thread's allocations to `heap` from now on; returns what was charged before. Null:
/// nobody.
std::shared_ptr<Heap> exchange_scope(std::shared_ptr<Heap> heap);

/// Charges allocations on a CUDA device outside of every scope to `heap`. Null: nobody.
/// Error{kInvalid} for a device beyond those that one process can have.
void set_device_default(int device, std::shared_ptr<Heap> heap);

/// The table for the torch extension.
const tem_host_api& host_api();

/// The same for CUDA torch.
MallocDirectory& malloc_directory();

}  // namespace tem
