// torch's CUDA allocator over the mallocs of accounts: every function of c10's interface, as torch's own
// caching allocator answers it. It holds no memory itself: blocks, cache and figures are the mallocs'.
//
// Nothing here takes the GIL, but for what torch hands in: stacks, observers and providers.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "alloc/malloc.hpp"
#include "core/error.hpp"
#include "torch/compat.hpp"
#include "torch/cuda_history.hpp"
#include "torch/cuda_pools.hpp"

namespace tem::torch_cuda {

using c10::DeviceIndex;
using c10::MempoolId_t;

/// An error of the core as torch knows it.
[[noreturn]] void raise(const Error& error);

template <typename Call>
auto translated(Call&& call) {
  try {
    return call();
  } catch (const Error& error) {
    raise(error);
  }
}

inline PoolId pool_id(MempoolId_t id) { return {id.first, id.second}; }

class CudaAllocator final : public caching::CUDAAllocator {
 public:
  /// The one of this process, made at the first call. Leaked: torch frees tensors while static destructors
  /// run.
  static CudaAllocator& over(MallocDirectory& directory);

  c10::DataPtr allocate(size_t bytes) override;
  c10::DeleterFnPtr raw_deleter() const override;
#if TEM_TORCH_HAS_ALLOCATE_AT
  c10::DataPtr allocateWithAddress(size_t bytes, void* address) override;
#endif
  void* raw_alloc(size_t bytes) override;
  void* raw_alloc_with_stream(size_t bytes, cudaStream_t stream) override;
  void raw_delete(void* block) override;
  using caching::CUDAAllocator::recordStream;
  void recordStream(const c10::DataPtr& data, c10::cuda::CUDAStream stream) override;
  void copy_data(void* to, const void* from, std::size_t bytes) const override;
  cudaError_t memcpyAsync(void* to, int to_device, const void* from, int from_device, size_t bytes,
                          cudaStream_t stream, bool p2p_enabled) override;
  void enablePeerAccess(DeviceIndex device, DeviceIndex accessed) override;
  caching::ShareableHandle shareIpcHandle(void* block) override;
  std::shared_ptr<void> getIpcDevPtr(std::string handle) override;

  void init(int device_count) override;
  bool initialized() override { return device_count_ > 0; }
  void enable(bool value) override { enabled_ = value; }
  bool isEnabled() const override { return enabled_; }
  std::string name() override { return "torch_elastic_mem"; }

  void emptyCache(MempoolId_t pool) override;
  void cacheInfo(DeviceIndex device, size_t* largest) override;
  void* getBaseAllocation(void* block, size_t* bytes) override;
  double getMemoryFraction(DeviceIndex device) override;
  void setMemoryFraction(double fraction, DeviceIndex device) override;
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override;
  void resetAccumulatedStats(DeviceIndex device) override;
  void resetPeakStats(DeviceIndex device) override;
  std::vector<caching::StreamSegmentSize> getExpandableSegmentSizes(DeviceIndex device) override;
  caching::SnapshotInfo snapshot(MempoolId_t pool, bool include_traces) override;

  void createOrIncrefPool(DeviceIndex device, MempoolId_t pool,
                          std::shared_ptr<caching::CUDAAllocator> provider) override;
  void beginAllocateToPool(DeviceIndex device, MempoolId_t pool,
                           std::function<bool(cudaStream_t)> filter) override;
  void endAllocateToPool(DeviceIndex device, MempoolId_t pool) override;
  void releasePool(DeviceIndex device, MempoolId_t pool) override;
  int getPoolUseCount(DeviceIndex device, MempoolId_t pool) override;
  void setUseOnOOM(DeviceIndex device, MempoolId_t pool, bool use) override;
  void setNoSplit(DeviceIndex device, MempoolId_t pool) override;
  bool checkPoolLiveAllocations(DeviceIndex device, MempoolId_t pool,
                                const std::unordered_set<void*>& expected) override;
  std::shared_ptr<caching::AllocatorState> getCheckpointState(DeviceIndex device, MempoolId_t pool) override;
  caching::CheckpointDelta setCheckpointPoolState(DeviceIndex device,
                                                  std::shared_ptr<caching::AllocatorState> state) override;

  bool isHistoryEnabled() override { return history_.enabled(); }
  void recordHistory(bool enabled, caching::CreateContextFn recorder, size_t most_entries, RecordContext when,
                     bool clear, const std::vector<std::string>& skipped) override;
  void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& metadata) override;
  void pushCompileContext(std::string& name) override { history_.push_compile_context(name); }
  void popCompileContext() override { history_.pop_compile_context(); }
  void setUserMetadata(const std::string& metadata) override { history_.set_user_metadata(metadata); }
  std::string getUserMetadata() override { return history_.user_metadata(); }
  void attachAllocatorTraceTracker(caching::AllocatorTraceTracker tracker) override;
  void attachOutOfMemoryObserver(caching::OutOfMemoryObserver observer) override;
#if TEM_TORCH_HAS_OOM_REJECTION
  std::shared_ptr<c10::GatheredContext> getContextForPointer(const void* block) override;
  void attachOomRejectionObserver(caching::OomRejectionObserver observer) override;
#endif
#if TEM_TORCH_HAS_ANNOTATE
  bool supportsUserMetadata() override { return true; }
  void annotateMemory(const void* block, const std::string& metadata) override;
#endif

 private:
  explicit CudaAllocator(MallocDirectory& directory);

  void* obtain(size_t bytes, DeviceIndex device, cudaStream_t stream);
  void* obtain_from(Malloc& malloc, size_t bytes, DeviceIndex device, cudaStream_t stream);
  void* obtain_from(ProviderPool& pool, size_t bytes, DeviceIndex device, cudaStream_t stream);
#if TEM_TORCH_HAS_OOM_REJECTION
  void reject_over_fraction(Malloc& malloc, size_t bytes, DeviceIndex device);
#endif
  [[noreturn]] void refuse(Malloc* malloc, const std::string& why, size_t bytes, DeviceIndex device,
                           cudaStream_t stream);
  void give_back(void* block);
  static void release(void* block) noexcept;

  /// What this thread allocates from on a device; the second is null where the first raises.
  Malloc& serving(DeviceIndex device);
  Malloc* maybe_serving(DeviceIndex device);
  void check_device(DeviceIndex device) const;
  Malloc& pool_malloc(DeviceIndex device, PoolId pool);
  void watch_all();

  MallocDirectory& directory_;
  const int born_in_;
  std::atomic<int> device_count_{0};
  std::atomic<bool> enabled_;
  History history_;
  Pools pools_;

  std::mutex observers_mutex_;
  std::vector<caching::OutOfMemoryObserver> observers_;
#if TEM_TORCH_HAS_OOM_REJECTION
  std::vector<caching::OomRejectionObserver> rejection_observers_;
#endif
};

}  // namespace tem::torch_cuda
