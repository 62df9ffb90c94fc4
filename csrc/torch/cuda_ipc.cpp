// Memory that crosses processes. Handles of three kinds may arrive: ours; torch's own of cudaMalloc, which
// are a version, a letter and what the driver gave, or from old versions the driver's part alone; and torch's
// own of expandable segments.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>

#include <cstring>

#include "torch/cuda_allocator.hpp"

namespace tem::torch_cuda {
namespace {

constexpr size_t kHead = 2;  // of torch's own handles
constexpr char kSegments = 'e';
constexpr char kNewestOfTorch = 0x1f;  // a version that no torch has reached; ours start beyond

std::shared_ptr<void> open_from_driver(const char* bytes) {
  cudaIpcMemHandle_t from_driver;
  std::memcpy(&from_driver, bytes, sizeof from_driver);
  const DeviceIndex device = c10::cuda::current_device();
  void* opened = nullptr;
  // The driver counts how often a handle is open, so each pointer may close it once.
  C10_CUDA_CHECK(cudaIpcOpenMemHandle(&opened, from_driver, cudaIpcMemLazyEnablePeerAccess));
  return {opened, [device](void* address) {
            try {
              const c10::cuda::CUDAGuard guard(device);
              C10_CUDA_CHECK_WARN(cudaIpcCloseMemHandle(address));
            } catch (const c10::Error&) {
              // CUDA is going down, and its mappings with it.
            }
          }};
}

}  // namespace

caching::ShareableHandle CudaAllocator::shareIpcHandle(void* block) {
  TORCH_CHECK(
      directory_.owner(block) != nullptr, "torch_elastic_mem: ", block,
      " cannot be sent to another process: it comes from another allocator than an account's (a MemPool "
      "with its own, or the caching allocator is off); send a clone made outside of it");
  SharedBlock shared = translated([&] { return directory_.share(block); });
  return {static_cast<ptrdiff_t>(shared.offset), std::move(shared.handle)};
}

std::shared_ptr<void> CudaAllocator::getIpcDevPtr(std::string handle) {
  if (handle.size() == sizeof(cudaIpcMemHandle_t)) return open_from_driver(handle.data());
  if (handle.size() > kHead && 0 <= handle[0] && handle[0] <= kNewestOfTorch) {
    TORCH_CHECK(
        handle[1] != kSegments,
        "torch_elastic_mem: the sender's torch has expandable segments, which only torch's own allocator "
        "can receive; turn expandable_segments off there, or give the sender an account too");
    if (handle[1] == 'c' && handle.size() == kHead + sizeof(cudaIpcMemHandle_t)) {
      return open_from_driver(handle.data() + kHead);
    }
  }
  return translated([&] { return directory_.open_shared(c10::cuda::current_device(), handle); });
}

}  // namespace tem::torch_cuda
