// Figures, limits and snapshots: what mallocs know, in torch's words.
#include <c10/core/AllocatorConfig.h>
#include <c10/cuda/CUDAAllocatorConfig.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

#include "torch/cuda_allocator.hpp"

namespace tem::torch_cuda {
namespace {

using c10::CachingAllocator::AcceleratorAllocatorConfig;
using c10::CachingDeviceAllocator::DeviceStats;

c10::CachingAllocator::Stat stat(const Stat& from) {
  c10::CachingAllocator::Stat to;
  to.current = from.current;
  to.peak = from.peak;
  to.allocated = from.allocated;
  to.freed = from.freed;
  return to;
}

/// In the order of c10's StatType.
c10::CachingAllocator::StatArray stats(const StatBySize& from) {
  return {stat(from.all), stat(from.small), stat(from.large)};
}

caching::SegmentInfo segment_info(const SegmentView& from, DeviceIndex device, History& history) {
  caching::SegmentInfo to;
  to.device = device;
  to.address = from.address;
  to.total_size = from.bytes;
  to.stream = reinterpret_cast<void*>(from.stream);
  to.is_large = !from.small;
  to.is_expandable = true;
  to.owner_private_pool_id = {from.pool.first, from.pool.second};
  Address at = from.address;
  for (const BlockView& block : from.blocks) {
    caching::BlockInfo& info = to.blocks.emplace_back();
    info.size = block.bytes;
    info.requested_size = block.requested;
    info.allocated = block.allocated;
    info.active = block.active;
    if (block.allocated) to.allocated_size += block.bytes;
    if (block.active) {
      to.active_size += block.bytes;
      to.requested_size += block.requested;
      info.context_when_allocated = history.context_of(at);
    }
    at += block.bytes;
  }
  return to;
}

caching::AllocatorConfigInfo config() {
  using caching::CUDAAllocatorConfig;
  caching::AllocatorConfigInfo info{};
  info.garbage_collection_threshold = AcceleratorAllocatorConfig::garbage_collection_threshold();
  info.max_split_size = AcceleratorAllocatorConfig::max_split_size();
  info.pinned_num_register_threads = CUDAAllocatorConfig::pinned_num_register_threads();
  info.expandable_segments = true;
  info.release_lock_on_malloc = CUDAAllocatorConfig::release_lock_on_cudamalloc();
  info.pinned_use_host_register = CUDAAllocatorConfig::pinned_use_cuda_host_register();
  info.graph_capture_record_stream_reuse = CUDAAllocatorConfig::graph_capture_record_stream_reuse();
  info.last_allocator_settings = AcceleratorAllocatorConfig::last_allocator_settings();
  info.roundup_power2_divisions = AcceleratorAllocatorConfig::roundup_power2_divisions();
#if TEM_TORCH_HAS_PINNED_SIZES
  info.max_round_threshold = AcceleratorAllocatorConfig::pinned_max_round_threshold();
  info.max_cached_size = AcceleratorAllocatorConfig::pinned_max_cached_size();
#endif
  return info;
}

}  // namespace

DeviceStats CudaAllocator::getDeviceStats(DeviceIndex device) {
  Malloc* const malloc = maybe_serving(device);
  const MallocStats from = malloc == nullptr ? MallocStats{} : translated([&] { return malloc->stats(); });
  DeviceStats to;
  to.allocation = stats(from.allocation);
  to.segment = stats(from.segment);
  to.active = stats(from.active);
  to.inactive_split = stats(from.inactive_split);
  to.allocated_bytes = stats(from.allocated_bytes);
  to.reserved_bytes = stats(from.reserved_bytes);
  to.active_bytes = stats(from.active_bytes);
  to.inactive_split_bytes = stats(from.inactive_split_bytes);
  to.requested_bytes = stats(from.requested_bytes);
  to.num_alloc_retries = from.retries;
  to.num_ooms = from.out_of_memory;
  to.num_sync_all_streams = from.waits;
  to.num_device_alloc = from.maps;
  to.num_device_free = from.unmaps;
#if TEM_TORCH_HAS_OOM_REJECTION
  to.num_oom_rejections = from.rejections;
#endif
#if TEM_TORCH_HAS_POOL_FIGURES
  for (const auto& [pool, reserved] : from.reserved_bytes_by_pool) {
    to.reserved_bytes_by_private_pools[{pool.first, pool.second}] = stats(reserved);
  }
#endif
  to.max_split_size = static_cast<int64_t>(AcceleratorAllocatorConfig::max_split_size());
  return to;
}

void CudaAllocator::resetAccumulatedStats(DeviceIndex device) {
  if (Malloc* const malloc = maybe_serving(device)) translated([&] { malloc->reset_accumulated(); });
}

void CudaAllocator::resetPeakStats(DeviceIndex device) {
  if (Malloc* const malloc = maybe_serving(device)) translated([&] { malloc->reset_peak(); });
}

void CudaAllocator::emptyCache(MempoolId_t) {
  // What is free in a pool that nobody needs any more is in its malloc's cache, so there is but one to empty.
  const History::Scope scope(history_, RecordContext::ALL);
  for (int index = 0; index < device_count_; ++index) {
    if (Malloc* const malloc = directory_.serving(index)) translated([&] { malloc->empty_cache(); });
  }
  for (const auto& provider : pools_.providers()) provider->empty_cache();
}

void CudaAllocator::cacheInfo(DeviceIndex device, size_t* largest) {
  Malloc& malloc = serving(device);
  translated([&] {
    // Who passes 0 asks for a guess of what could be had.
    if (*largest == 0) {
      const size_t limit = malloc.limit();
      const auto reserved = static_cast<size_t>(malloc.stats().reserved_bytes.all.current);
      *largest = std::min(getMemoryInfo(device).first, limit - std::min(limit, reserved));
    }
    const auto stream = reinterpret_cast<Stream>(c10::cuda::getCurrentCUDAStream(device).stream());
    *largest = std::max(*largest, malloc.largest_free(stream));
  });
}

void* CudaAllocator::getBaseAllocation(void* block, size_t* bytes) {
  std::pair<void*, size_t> base{nullptr, 0};
  if (const auto provider = pools_.provider_of(block)) {
    base = provider->block_at(block);
  } else if (Malloc* const owner = directory_.owner(block)) {
    const BlockView view = translated([&] { return owner->block_at(block); });
    if (view.allocated) base = {reinterpret_cast<void*>(view.address), view.bytes};
  }
  TORCH_CHECK(base.first != nullptr, "invalid device pointer: ", block);
  if (bytes != nullptr) *bytes = base.second;
  return base.first;
}

double CudaAllocator::getMemoryFraction(DeviceIndex device) {
  check_device(device);
  Malloc& malloc = serving(device);
  const size_t total = getMemoryInfo(device).second;
  return std::min(1.0, static_cast<double>(malloc.limit()) / static_cast<double>(total));
}

void CudaAllocator::setMemoryFraction(double fraction, DeviceIndex device) {
  check_device(device);
  TORCH_CHECK_VALUE(0 <= fraction && fraction <= 1, "invalid fraction:", fraction,
                    ". Please set within [0, 1].");
  const auto total = static_cast<double>(getMemoryInfo(device).second);
  Malloc& malloc = serving(device);
  translated([&] { malloc.set_limit(static_cast<size_t>(fraction * total)); });
}

std::vector<caching::StreamSegmentSize> CudaAllocator::getExpandableSegmentSizes(DeviceIndex device) {
  std::map<std::pair<Stream, bool>, size_t> bytes;
  if (Malloc* const malloc = maybe_serving(device)) {
    for (const auto& segment : translated([&] { return malloc->segments({}); })) {
      bytes[{segment.stream, segment.small}] += segment.bytes;
    }
  }
  std::vector<caching::StreamSegmentSize> sizes;
  for (const auto& [key, sum] : bytes) {
    sizes.emplace_back(reinterpret_cast<cudaStream_t>(key.first), key.second, sum);
  }
  return sizes;
}

caching::SnapshotInfo CudaAllocator::snapshot(MempoolId_t pool, bool include_traces) {
  caching::SnapshotInfo result;
  const PoolId wanted = pool_id(pool);
  if (include_traces) result.external_annotations = history_.annotations();
  for (int index = 0; index < device_count_; ++index) {
    const auto device = static_cast<DeviceIndex>(index);
    if (include_traces) result.device_traces.push_back(history_.trace(device));
    const size_t before = result.segments.size();
    if (Malloc* const malloc = directory_.serving(index)) {
      for (const auto& segment : translated([&] { return malloc->segments(wanted); })) {
        result.segments.push_back(segment_info(segment, device, history_));
      }
    }
    for (const auto& provider : pools_.providers()) {
      if (provider->device() != device || !(wanted.shared() || provider->id() == wanted)) continue;
      for (auto& segment : provider->segments()) {
        // What a provider has of an account is in the account's segments.
        const bool shown = directory_.owner(reinterpret_cast<void*>(segment.address)) != nullptr;
        if (!wanted.shared() || !shown) result.segments.push_back(std::move(segment));
      }
    }
    const auto first = result.segments.begin() + static_cast<std::ptrdiff_t>(before);
    // NCCL registers a pool's segments in this order, on all ranks at once. So it is that of their places in
    // the heap, which are the same where ranks do the same, and not that of addresses.
    int32_t order = 0;
    std::for_each(first, result.segments.end(),
                  [&](auto& segment) { segment.registration_counter = order++; });
    std::sort(first, result.segments.end(),
              [](const auto& left, const auto& right) { return left.address < right.address; });
    const size_t active =
        std::accumulate(first, result.segments.end(), size_t{0},
                        [](size_t sum, const auto& segment) { return sum + segment.active_size; });
    history_.record(Action::SNAPSHOT, device, 0, active, 0);
  }
  result.config_metadata = config();
  return result;
}

}  // namespace tem::torch_cuda
