// Which account a thread's allocations are charged to.
#pragma once

#include <memory>

#include "alloc/allocator.hpp"
#include "capi/tem.h"

namespace tem {

/// Charges this thread's allocations to `allocator` from now on; returns what was charged before. Null:
/// nobody.
std::shared_ptr<Allocator> exchange_scope(std::shared_ptr<Allocator> allocator);

/// Charges allocations on a CUDA device outside of every scope to `allocator`. Null: nobody.
void set_device_default(int device, std::shared_ptr<Allocator> allocator);

/// The table for the torch extension.
const tem_host_api& host_api();

}  // namespace tem
