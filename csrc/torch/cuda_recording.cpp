// What torch.cuda.memory and its like turn on and off: history, trackers, annotations.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include "torch/cuda_allocator.hpp"

namespace tem::torch_cuda {

void CudaAllocator::recordHistory(bool enabled, caching::CreateContextFn recorder, size_t most_entries,
                                  RecordContext when, bool clear, const std::vector<std::string>& skipped) {
  History::Settings settings{enabled, recorder, most_entries, when, {}};
  for (const auto& action : skipped) {
    settings.skipped.insert(c10::CachingDeviceAllocator::parseTraceEntryAction(action));
  }
  history_.configure(std::move(settings), clear);
  watch_all();
}

void CudaAllocator::attachAllocatorTraceTracker(caching::AllocatorTraceTracker tracker) {
  history_.add_tracker(std::move(tracker));
  watch_all();
}

void CudaAllocator::watch_all() {
  for (int index = 0; index < device_count_; ++index) {
    const auto device = static_cast<DeviceIndex>(index);
    if (Malloc* const malloc = directory_.serving(index)) history_.watch(device, *malloc);
  }
}

void CudaAllocator::recordAnnotation(const std::vector<std::pair<std::string, std::string>>& metadata) {
  if (history_.enabled()) history_.annotate(c10::cuda::current_device(), metadata);
}

#if TEM_TORCH_HAS_OOM_REJECTION
std::shared_ptr<c10::GatheredContext> CudaAllocator::getContextForPointer(const void* block) {
  return history_.context_of(reinterpret_cast<size_t>(block));
}
#endif

#if TEM_TORCH_HAS_ANNOTATE
void CudaAllocator::annotateMemory(const void* block, const std::string& metadata) {
  if (!history_.enabled()) return;
  size_t bytes = 0;
  void* const base = getBaseAllocation(const_cast<void*>(block), &bytes);
  history_.annotate_block(c10::cuda::current_device(), reinterpret_cast<size_t>(base), bytes, metadata);
}
#endif

}  // namespace tem::torch_cuda
