// Memory that crosses processes. torch's handle is a version, a letter for its kind, and what the driver
// gave; older versions sent the driver's part alone.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>

#include <cstring>

#include "torch/cuda_allocator.hpp"

namespace tem::torch_cuda {

caching::ShareableHandle CudaAllocator::shareIpcHandle(void*) {
  TORCH_CHECK(
      false,
      "torch_elastic_mem: tensors of an account cannot be sent to another process yet; send a copy on "
      "the host (tensor.cpu())");
}

std::shared_ptr<void> CudaAllocator::getIpcDevPtr(std::string handle) {
  constexpr size_t kHead = 2;
  cudaIpcMemHandle_t from_driver;
  const bool plain = handle.size() == sizeof from_driver;
  TORCH_CHECK(plain || (handle.size() == kHead + sizeof from_driver && handle[1] == 'c'),
              "torch_elastic_mem: only memory that the sender took with cudaMalloc can be received yet; turn "
              "expandable_segments off there");
  std::memcpy(&from_driver, handle.data() + (plain ? 0 : kHead), sizeof from_driver);
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

}  // namespace tem::torch_cuda
