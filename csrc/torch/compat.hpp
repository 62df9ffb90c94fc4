// What differs between the minor versions of torch that this builds for: 2.11 to 2.15.
#pragma once

#include <torch/headeronly/version.h>

#define TEM_TORCH_AT_LEAST(major, minor) \
  (TORCH_VERSION_MAJOR > (major) || (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))

// getContextForPointer; attachOomRejectionObserver, pure virtual; the setting throw_on_cudamalloc_oom.
#define TEM_TORCH_HAS_OOM_REJECTION TEM_TORCH_AT_LEAST(2, 12)
// AllocatorConfigInfo has two more sizes of pinned memory.
#define TEM_TORCH_HAS_PINNED_SIZES TEM_TORCH_AT_LEAST(2, 13)
// allocateWithAddress.
#define TEM_TORCH_HAS_ALLOCATE_AT TEM_TORCH_AT_LEAST(2, 13)
// DeviceStats has reserved_bytes_by_private_pools.
#define TEM_TORCH_HAS_POOL_FIGURES TEM_TORCH_AT_LEAST(2, 13)
// supportsUserMetadata and annotateMemory; TraceEntry::ANNOTATE.
#define TEM_TORCH_HAS_ANNOTATE TEM_TORCH_AT_LEAST(2, 14)
