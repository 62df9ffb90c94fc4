// Private pools and their checkpoints, as graph captures, graph trees and torch.cuda.MemPool ask for them.
#include "torch/cuda_allocator.hpp"

namespace tem::torch_cuda {
namespace {

struct Checkpoint final : caching::AllocatorState {
  PoolId pool;
  std::vector<PlacedBlock> blocks;
};

}  // namespace

void CudaAllocator::createOrIncrefPool(DeviceIndex device, MempoolId_t pool,
                                       std::shared_ptr<caching::CUDAAllocator> provider) {
  check_device(device);
  translated([&] {
    pools_.create(device, pool_id(pool), std::move(provider), [&]() -> Malloc& { return serving(device); });
  });
}

void CudaAllocator::beginAllocateToPool(DeviceIndex device, MempoolId_t pool,
                                        std::function<bool(cudaStream_t)> filter) {
  check_device(device);
  translated([&] {
    pools_.begin(device, pool_id(pool), std::move(filter), [&]() -> Malloc& { return serving(device); });
  });
}

void CudaAllocator::endAllocateToPool(DeviceIndex device, MempoolId_t pool) {
  check_device(device);
  translated([&] { pools_.end(device, pool_id(pool)); });
}

void CudaAllocator::releasePool(DeviceIndex device, MempoolId_t pool) {
  check_device(device);
  translated([&] { pools_.release(device, pool_id(pool)); });
}

int CudaAllocator::getPoolUseCount(DeviceIndex device, MempoolId_t pool) {
  check_device(device);
  return pools_.uses(device, pool_id(pool));
}

void CudaAllocator::setUseOnOOM(DeviceIndex device, MempoolId_t pool, bool use) {
  check_device(device);
  // A provider's blocks serve its pool alone.
  Malloc* const malloc = pools_.source(device, pool_id(pool)).malloc;
  if (malloc != nullptr) translated([&] { malloc->set_use_on_oom(pool_id(pool), use); });
}

void CudaAllocator::setNoSplit(DeviceIndex device, MempoolId_t pool) {
  check_device(device);
  Malloc* const malloc = pools_.source(device, pool_id(pool)).malloc;
  if (malloc != nullptr) translated([&] { malloc->set_no_split(pool_id(pool)); });
}

bool CudaAllocator::checkPoolLiveAllocations(DeviceIndex device, MempoolId_t pool,
                                             const std::unordered_set<void*>& expected) {
  check_device(device);
  const Pools::Source source = pools_.source(device, pool_id(pool));
  std::unordered_set<void*> live;
  if (source.provider) {
    const auto blocks = source.provider->live();
    live.insert(blocks.begin(), blocks.end());
  } else {
    for (const auto& block : translated([&] { return source.malloc->live_in(pool_id(pool)); })) {
      live.insert(reinterpret_cast<void*>(block.address));
    }
  }
  return live == expected;
}

Malloc& CudaAllocator::pool_malloc(DeviceIndex device, PoolId pool) {
  check_device(device);
  Malloc* const malloc = pools_.source(device, pool).malloc;
  TORCH_CHECK(malloc != nullptr, "torch_elastic_mem: a pool with an allocator of its own has no checkpoints");
  return *malloc;
}

std::shared_ptr<caching::AllocatorState> CudaAllocator::getCheckpointState(DeviceIndex device,
                                                                           MempoolId_t pool) {
  auto state = std::make_shared<Checkpoint>();
  state->pool = pool_id(pool);
  Malloc& malloc = pool_malloc(device, state->pool);
  state->blocks = translated([&] { return malloc.live_in(state->pool); });
  return state;
}

caching::CheckpointDelta CudaAllocator::setCheckpointPoolState(
    DeviceIndex device, std::shared_ptr<caching::AllocatorState> state) {
  const auto checkpoint = std::dynamic_pointer_cast<Checkpoint>(state);
  TORCH_CHECK(checkpoint, "torch_elastic_mem: the checkpoint is of another allocator");
  Malloc& malloc = pool_malloc(device, checkpoint->pool);
  const History::Scope scope(history_, RecordContext::STATE);
  caching::CheckpointDelta delta;
  for (const Address freed :
       translated([&] { return malloc.restore(checkpoint->pool, checkpoint->blocks); })) {
    delta.ptrs_freed.push_back(reinterpret_cast<void*>(freed));
  }
  for (const PlacedBlock& placed : checkpoint->blocks) {
    void* const block = reinterpret_cast<void*>(placed.address);
    delta.dataptrs_allocd.emplace_back(block, block, &release, c10::Device(c10::DeviceType::CUDA, device));
  }
  return delta;
}

}  // namespace tem::torch_cuda
