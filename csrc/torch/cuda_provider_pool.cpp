#include "torch/cuda_provider_pool.hpp"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <new>

namespace tem::torch_cuda {
namespace {

constexpr size_t kAlignment = 512;
constexpr size_t kLargestSmall = 1 << 20;

thread_local bool within_provider = false;

}  // namespace

bool ProviderPool::asking() noexcept { return within_provider; }

void* ProviderPool::allocate(size_t bytes, Stream stream) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const auto take = [&](void* address, Block& block) {
    block.live = true;
    block.requested = bytes;
    count_block(block, true);
    history_.record(Action::ALLOC, device_, reinterpret_cast<size_t>(address), bytes, stream, id_);
    return address;
  };
  {
    const std::lock_guard guard(mutex_);
    const auto found = std::find_if(blocks_.begin(), blocks_.end(), [&](const auto& each) {
      const Block& block = each.second;
      return !block.live && !block.shared && block.bytes == rounded && block.stream == stream;
    });
    if (found != blocks_.end()) return take(found->first, found->second);
  }
  // With no lock held: a provider may be Python.
  void* const made = ask(rounded, stream);
  if (made == nullptr) return nullptr;
  history_.record(Action::SEGMENT_ALLOC, device_, reinterpret_cast<size_t>(made), rounded, stream, id_);
  const std::lock_guard guard(mutex_);
  Block& block = blocks_[made];
  block.bytes = rounded;
  block.stream = stream;
  block.counted = counted_in_ != nullptr && directory_.owner(made) == nullptr;
  count_segment(block, true);
  return take(made, block);
}

void* ProviderPool::ask(size_t bytes, Stream stream) {
  struct Within {
    Within() { within_provider = true; }
    ~Within() { within_provider = false; }
  } within;
  try {
    return provider_->raw_alloc_with_stream(bytes, reinterpret_cast<cudaStream_t>(stream));
  } catch (const std::bad_alloc&) {
    // So says tem_cuda_alloc that there is nothing to be had.
    return nullptr;
  }
}

void ProviderPool::count_block(const Block& block, bool taken) {
  if (block.counted) counted_in_->count_provided_block(block.bytes, block.requested, taken);
}

void ProviderPool::count_segment(const Block& block, bool came) {
  if (block.counted) counted_in_->count_provided_segment(id_, block.bytes, came);
}

bool ProviderPool::free(void* address) {
  {
    const std::lock_guard guard(mutex_);
    const auto found = blocks_.find(address);
    if (found == blocks_.end() || !found->second.live) return false;
    Block& block = found->second;
    block.live = false;
    count_block(block, false);
    const auto at = reinterpret_cast<size_t>(address);
    history_.record(Action::FREE_REQUESTED, device_, at, block.requested, block.stream, id_);
    history_.record(Action::FREE_COMPLETED, device_, at, block.requested, block.stream, id_);
    if (!closed_) return true;
  }
  empty_cache();
  return true;
}

bool ProviderPool::record_stream(void* address, Stream stream) {
  const std::lock_guard guard(mutex_);
  const auto found = blocks_.find(address);
  if (found == blocks_.end()) return false;
  if (stream != found->second.stream) found->second.shared = true;
  return true;
}

void ProviderPool::empty_cache() {
  std::vector<std::pair<void*, Block>> leaving;
  {
    const std::lock_guard guard(mutex_);
    std::copy_if(blocks_.begin(), blocks_.end(), std::back_inserter(leaving),
                 [](const auto& each) { return !each.second.live; });
    for (const auto& [address, block] : leaving) blocks_.erase(address);
  }
  if (leaving.empty()) return;
  const c10::cuda::CUDAGuard device_guard(device_);
  cudaError_t waited = cudaSuccess;
  {
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    waited = cudaDeviceSynchronize();
  }
  if (waited != cudaSuccess) {
    // Something is captured, or the process ends: what the device may still touch stays.
    (void)cudaGetLastError();
    const std::lock_guard guard(mutex_);
    blocks_.insert(leaving.begin(), leaving.end());
    return;
  }
  for (const auto& [address, block] : leaving) {
    provider_->raw_delete(address);
    count_segment(block, false);
    history_.record(Action::SEGMENT_FREE, device_, reinterpret_cast<size_t>(address), block.bytes,
                    block.stream, id_);
  }
}

void ProviderPool::close() {
  {
    const std::lock_guard guard(mutex_);
    closed_ = true;
  }
  empty_cache();
}

bool ProviderPool::closed_and_empty() {
  const std::lock_guard guard(mutex_);
  return closed_ && blocks_.empty();
}

std::pair<void*, size_t> ProviderPool::block_at(const void* address) {
  const std::lock_guard guard(mutex_);
  const auto found = blocks_.find(const_cast<void*>(address));
  if (found == blocks_.end() || !found->second.live) return {nullptr, 0};
  return {found->first, found->second.bytes};
}

std::set<void*> ProviderPool::live() {
  const std::lock_guard guard(mutex_);
  std::set<void*> addresses;
  for (const auto& [address, block] : blocks_) {
    if (block.live) addresses.insert(address);
  }
  return addresses;
}

std::vector<caching::SegmentInfo> ProviderPool::segments() {
  const std::lock_guard guard(mutex_);
  std::vector<caching::SegmentInfo> segments;
  for (const auto& [address, block] : blocks_) {
    caching::SegmentInfo& segment = segments.emplace_back();
    segment.device = device_;
    segment.address = reinterpret_cast<size_t>(address);
    segment.total_size = block.bytes;
    segment.requested_size = block.live ? block.requested : 0;
    segment.allocated_size = segment.active_size = block.live ? block.bytes : 0;
    segment.stream = reinterpret_cast<void*>(block.stream);
    segment.is_large = block.bytes > kLargestSmall;
    segment.owner_private_pool_id = {id_.first, id_.second};
    caching::BlockInfo& info = segment.blocks.emplace_back();
    info.size = block.bytes;
    info.requested_size = segment.requested_size;
    info.allocated = info.active = block.live;
  }
  return segments;
}

}  // namespace tem::torch_cuda
