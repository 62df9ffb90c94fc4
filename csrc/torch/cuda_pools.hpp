// Private pools by device and id: whose malloc, or which other allocator, each draws on, and which streams
// draw on it now. A pool stays with the account that served the device when it was made, whatever account a
// later call is made under.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "alloc/malloc.hpp"
#include "torch/cuda_provider_pool.hpp"

namespace tem::torch_cuda {

class Pools {
 public:
  /// Where a pool's memory comes from: one of the two.
  struct Source {
    Malloc* malloc = nullptr;
    std::shared_ptr<ProviderPool> provider;
  };
  using Filter = std::function<bool(cudaStream_t)>;

  Pools(MallocDirectory& directory, History& history) : directory_(directory), history_(history) {}

  /// Each adds a use. `serving` is called for a pool that is new and has no provider.
  void create(c10::DeviceIndex device, PoolId id, std::shared_ptr<caching::CUDAAllocator> provider,
              const std::function<Malloc&()>& serving);
  void begin(c10::DeviceIndex device, PoolId id, Filter filter, const std::function<Malloc&()>& serving);
  void end(c10::DeviceIndex device, PoolId id);
  /// Takes a use away; the last one makes the pool's free memory anybody's.
  void release(c10::DeviceIndex device, PoolId id);

  /// Of a pool in use.
  Source source(c10::DeviceIndex device, PoolId id);
  int uses(c10::DeviceIndex device, PoolId id);
  /// What allocations on a stream come from; neither, if no pool claims it.
  Source claiming(c10::DeviceIndex device, cudaStream_t stream);
  /// All pools with a provider that have blocks or uses.
  std::vector<std::shared_ptr<ProviderPool>> providers();
  /// The one that holds a live block, or null.
  std::shared_ptr<ProviderPool> provider_of(const void* block);

 private:
  using Key = std::pair<c10::DeviceIndex, PoolId>;
  struct Pool {
    Source source;
    int uses = 0;
  };
  struct Route {
    Key key;
    Filter filter;
    Source source;
  };

  Pool& find(const Key& key);
  /// `enter` is told of the use where a malloc serves the pool; if it throws, nothing has changed.
  const Source& add_use(const Key& key, std::shared_ptr<caching::CUDAAllocator> provider,
                        const std::function<Malloc&()>& serving, const std::function<void(Malloc&)>& enter);

  MallocDirectory& directory_;
  History& history_;
  // Allocations and frees look here first, and mostly find that there is nothing to look for.
  std::atomic<bool> any_routes_{false};
  std::atomic<bool> any_providers_{false};

  std::mutex mutex_;
  std::map<Key, Pool> pools_;
  std::vector<Route> routes_;
  std::vector<std::shared_ptr<ProviderPool>> providers_;
};

}  // namespace tem::torch_cuda
