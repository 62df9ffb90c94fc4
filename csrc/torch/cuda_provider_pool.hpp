// A pool whose memory comes from another allocator, as torch.cuda.MemPool(allocator) asks: a provider frees
// at once what it is told to free, so blocks stay here, for others of their size and stream, until nobody
// needs the pool and the device has done with them.
//
// Its memory is in the figures of the malloc that served when the pool was made. A provider may draw on an
// account too, and then what it gives is in that account's figures already, whether or not it is free here.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "alloc/malloc.hpp"
#include "torch/cuda_history.hpp"

namespace tem::torch_cuda {

class ProviderPool {
 public:
  ProviderPool(c10::DeviceIndex device, PoolId id, std::shared_ptr<caching::CUDAAllocator> provider,
               MallocDirectory& directory, History& history)
      : device_(device),
        id_(id),
        provider_(std::move(provider)),
        directory_(directory),
        counted_in_(directory.serving(device)),
        history_(history) {}

  /// Whether this thread is within a provider: what that allocates is for no pool.
  static bool asking() noexcept;

  /// Null where the provider has nothing to give.
  void* allocate(size_t bytes, Stream stream);
  /// False for what is no live block of this pool.
  bool free(void* block);
  bool record_stream(void* block, Stream stream);
  /// Gives back what is free, unless something is being captured.
  void empty_cache();
  /// From now on the provider gets back what is freed.
  void close();
  bool closed_and_empty();

  c10::DeviceIndex device() const { return device_; }
  PoolId id() const { return id_; }
  /// Null if no account served the device.
  Malloc* counted_in() const { return counted_in_; }
  /// Base and size of a live block; {nullptr, 0} if it is none of this pool.
  std::pair<void*, size_t> block_at(const void* block);
  std::set<void*> live();
  std::vector<caching::SegmentInfo> segments();

 private:
  struct Block {
    size_t bytes = 0;
    size_t requested = 0;
    Stream stream = 0;
    bool live = false;
    bool counted = false;
    bool shared = false;  // other streams used it, so it serves no more before it is given back
  };

  const c10::DeviceIndex device_;
  const PoolId id_;
  const std::shared_ptr<caching::CUDAAllocator> provider_;
  MallocDirectory& directory_;
  Malloc* const counted_in_;
  History& history_;

  void* ask(size_t bytes, Stream stream);
  void count_block(const Block& block, bool taken);
  void count_segment(const Block& block, bool came);

  std::mutex mutex_;
  std::map<void*, Block> blocks_;
  bool closed_ = false;
};

}  // namespace tem::torch_cuda
