#include "torch/cuda_pools.hpp"

#include <algorithm>

namespace tem::torch_cuda {

Pools::Pool& Pools::find(const Key& key) {
  const auto found = pools_.find(key);
  TORCH_CHECK(found != pools_.end(), "Could not find pool of id (", key.second.first, ", ", key.second.second,
              ") on device ", static_cast<int>(key.first));
  return found->second;
}

const Pools::Source& Pools::add_use(const Key& key, std::shared_ptr<caching::CUDAAllocator> provider,
                                    const std::function<Malloc&()>& serving,
                                    const std::function<void(Malloc&)>& enter) {
  const auto found = pools_.find(key);
  Pool pool = found == pools_.end() ? Pool{} : found->second;
  if (pool.uses == 0 && provider) {
    pool.source.provider =
        std::make_shared<ProviderPool>(key.first, key.second, std::move(provider), directory_, history_);
    providers_.push_back(pool.source.provider);
    any_providers_ = true;
  } else if (pool.uses == 0) {
    pool.source.malloc = &serving();
  }
  if (pool.source.malloc != nullptr) enter(*pool.source.malloc);
  ++pool.uses;
  return (pools_[key] = std::move(pool)).source;
}

void Pools::create(c10::DeviceIndex device, PoolId id, std::shared_ptr<caching::CUDAAllocator> provider,
                   const std::function<Malloc&()>& serving) {
  const std::lock_guard guard(mutex_);
  add_use({device, id}, std::move(provider), serving, [&](Malloc& malloc) { malloc.create_pool(id); });
}

void Pools::begin(c10::DeviceIndex device, PoolId id, Filter filter,
                  const std::function<Malloc&()>& serving) {
  const std::lock_guard guard(mutex_);
  const Key key{device, id};
  TORCH_CHECK(
      std::none_of(routes_.begin(), routes_.end(), [&](const Route& each) { return each.key == key; }),
      "beginAllocateToPool: already recording to mempool_id");
  const Source& source = add_use(key, nullptr, serving, [&](Malloc& malloc) {
    malloc.begin_pool(id, [filter](Stream stream) {
      return !ProviderPool::asking() && filter(reinterpret_cast<cudaStream_t>(stream));
    });
  });
  routes_.push_back({key, std::move(filter), source});
  any_routes_ = true;
}

void Pools::end(c10::DeviceIndex device, PoolId id) {
  const std::lock_guard guard(mutex_);
  const Key key{device, id};
  const auto found =
      std::find_if(routes_.begin(), routes_.end(), [&](const Route& each) { return each.key == key; });
  TORCH_CHECK(found != routes_.end(), "endAllocatePool: not currently recording to mempool_id");
  Malloc* const malloc = found->source.malloc;
  routes_.erase(found);
  any_routes_ = !routes_.empty();
  if (malloc != nullptr) malloc->end_pool(id);
}

void Pools::release(c10::DeviceIndex device, PoolId id) {
  Source ended;
  {
    const std::lock_guard guard(mutex_);
    Pool& pool = find({device, id});
    if (pool.source.malloc != nullptr) pool.source.malloc->release_pool(id);
    if (--pool.uses > 0) return;
    ended = pool.source;
    pools_.erase({device, id});
  }
  if (!ended.provider) return;
  // With no lock held: a provider may be Python.
  ended.provider->close();
  const std::lock_guard guard(mutex_);
  std::erase_if(providers_, [](const auto& each) { return each->closed_and_empty(); });
  any_providers_ = !providers_.empty();
}

Pools::Source Pools::source(c10::DeviceIndex device, PoolId id) {
  const std::lock_guard guard(mutex_);
  return find({device, id}).source;
}

int Pools::uses(c10::DeviceIndex device, PoolId id) {
  const std::lock_guard guard(mutex_);
  return find({device, id}).uses;
}

Pools::Source Pools::claiming(c10::DeviceIndex device, cudaStream_t stream) {
  if (!any_routes_.load(std::memory_order_acquire) || ProviderPool::asking()) return {};
  const std::lock_guard guard(mutex_);
  // The innermost of nested ones, as in a malloc.
  const auto found = std::find_if(routes_.rbegin(), routes_.rend(), [&](const Route& route) {
    return route.key.first == device && route.filter(stream);
  });
  return found == routes_.rend() ? Source{} : found->source;
}

std::vector<std::shared_ptr<ProviderPool>> Pools::providers() {
  if (!any_providers_.load(std::memory_order_acquire)) return {};
  const std::lock_guard guard(mutex_);
  return providers_;
}

std::shared_ptr<ProviderPool> Pools::provider_of(const void* block) {
  if (!any_providers_.load(std::memory_order_acquire)) return nullptr;
  const std::lock_guard guard(mutex_);
  const auto found = std::find_if(providers_.begin(), providers_.end(),
                                  [&](const auto& each) { return each->block_at(block).first != nullptr; });
  return found == providers_.end() ? nullptr : *found;
}

}  // namespace tem::torch_cuda
