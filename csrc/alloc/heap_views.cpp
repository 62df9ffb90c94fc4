// What a heap says of itself.
#include <algorithm>

#include "alloc/heap.hpp"
#include "alloc/heap_visits.hpp"

namespace tem {
namespace {

void set(Stat& stat, int64_t now) {
  if (now > stat.current) {
    stat.add(now - stat.current);
  } else {
    stat.sub(stat.current - now);
  }
}

template <class Change>
void for_each_stat(MallocStats& stats, Change change) {
  for (StatBySize* figure :
       {&stats.allocation, &stats.segment, &stats.active, &stats.inactive_split, &stats.allocated_bytes,
        &stats.reserved_bytes, &stats.active_bytes, &stats.inactive_split_bytes, &stats.requested_bytes}) {
    for (Stat* stat : {&figure->all, &figure->small, &figure->large}) change(*stat);
  }
  for (auto& [pool, figure] : stats.reserved_bytes_by_pool) {
    for (Stat* stat : {&figure.all, &figure.small, &figure.large}) change(*stat);
  }
}

/// The blocks of a slab, with what is free between them.
void add_blocks(const Slab& slab, Address base, size_t slab_bytes, std::vector<BlockView>& out) {
  size_t end = 0;  // of what is listed
  const auto add = [&](size_t until, BlockView view) {
    view.address = base + end;
    view.bytes = until - end;
    if (view.bytes != 0) out.push_back(view);
    end = until;
  };
  for (uint32_t block = 0; block < slab.capacity(); ++block) {
    if (slab.available(block)) continue;
    const size_t start = block * slab.block_bytes();
    const bool live = slab.live(block);
    const size_t requested = slab.requested(block);
    add(start, {});
    add(start + round_up(std::max<size_t>(requested, 1), kAlignment),
        {0, 0, live ? requested : 0, live, true});
  }
  add(slab_bytes, {});
}

}  // namespace

size_t Heap::live_bytes() {
  const Guard guard(mutex_);
  return static_cast<size_t>(stats_.allocated_bytes.all.current - provided_bytes_);
}

size_t Heap::live_blocks() {
  const Guard guard(mutex_);
  return static_cast<size_t>(stats_.allocation.all.current - provided_blocks_);
}

/// What is split is found by a walk: no allocation pays for it, so its peaks are those of the moments asked.
MallocStats Heap::stats() {
  const Guard guard(mutex_);
  int64_t counts[2] = {0, 0};
  int64_t bytes[2] = {0, 0};
  for_each_span([&](const Span* span) {
    if (span->state != SpanState::kFree) return;
    size_t whole = 0;
    extents_.within(span->offset, span->end(), [&](const MappedExtent& e) { whole += e.piece.bytes; });
    if (whole == span->bytes) return;
    counts[span->lane->small ? 1 : 0] += 1;
    bytes[span->lane->small ? 1 : 0] += static_cast<int64_t>(span->bytes - whole);
  });
  const auto put = [](StatBySize& figure, const int64_t (&now)[2]) {
    set(figure.large, now[0]);
    set(figure.small, now[1]);
    set(figure.all, now[0] + now[1]);
  };
  put(stats_.inactive_split, counts);
  put(stats_.inactive_split_bytes, bytes);
  return stats_;
}

void Heap::count_retry() {
  const Guard guard(mutex_);
  ++stats_.retries;
}

void Heap::count_out_of_memory() {
  const Guard guard(mutex_);
  ++stats_.out_of_memory;
}

void Heap::count_rejection() {
  const Guard guard(mutex_);
  ++stats_.rejections;
}

void Heap::count_segments(PoolId pool, bool small, int64_t segments, int64_t bytes, bool came) {
  StatBySize* const of_pool = pool.shared() ? nullptr : &stats_.reserved_bytes_by_pool[pool];
  if (came) {
    stats_.segment.add(small, segments);
    stats_.reserved_bytes.add(small, bytes);
    if (of_pool != nullptr) of_pool->add(small, bytes);
    stats_.maps += segments;
  } else {
    stats_.segment.sub(small, segments);
    stats_.reserved_bytes.sub(small, bytes);
    if (of_pool != nullptr) of_pool->sub(small, bytes);
    stats_.unmaps += segments;
  }
}

void Heap::count_provided_segment(PoolId pool, size_t bytes, bool came) {
  const Guard guard(mutex_);
  count_segments(pool, bytes <= kSmallBlock, 1, static_cast<int64_t>(bytes), came);
}

void Heap::count_provided_block(size_t bytes, size_t requested, bool taken) {
  const bool small = bytes <= kSmallBlock;
  const auto each = [&](auto change) {
    change(stats_.allocation, 1);
    change(stats_.active, 1);
    change(stats_.allocated_bytes, static_cast<int64_t>(bytes));
    change(stats_.active_bytes, static_cast<int64_t>(bytes));
    change(stats_.requested_bytes, static_cast<int64_t>(requested));
  };
  const Guard guard(mutex_);
  if (taken) {
    each([&](StatBySize& figure, int64_t n) { figure.add(small, n); });
  } else {
    each([&](StatBySize& figure, int64_t n) { figure.sub(small, n); });
  }
  provided_blocks_ += taken ? 1 : -1;
  provided_bytes_ += taken ? static_cast<int64_t>(bytes) : -static_cast<int64_t>(bytes);
}

void Heap::reset_peak() {
  const Guard guard(mutex_);
  for_each_stat(stats_, [](Stat& stat) { stat.peak = stat.current; });
  forget_gone_pools();
}

void Heap::reset_accumulated() {
  const Guard guard(mutex_);
  for_each_stat(stats_, [](Stat& stat) { stat.allocated = stat.freed = 0; });
  stats_.retries = stats_.out_of_memory = stats_.rejections = stats_.waits = 0;
  stats_.maps = stats_.unmaps = 0;
  forget_gone_pools();
}

/// Captures make pools without end.
void Heap::forget_gone_pools() {
  auto& all = stats_.reserved_bytes_by_pool;
  for (auto it = all.begin(); it != all.end();) {
    const Stat& stat = it->second.all;
    const bool empty = stat.peak == 0 && stat.allocated == 0 && stat.freed == 0;
    it = empty && pools_.count(it->first) == 0 ? all.erase(it) : std::next(it);
  }
}

std::vector<SegmentView> Heap::segments(PoolId pool) {
  const Guard guard(mutex_);
  std::vector<SegmentView> out;
  const Lane* lane = nullptr;
  size_t end = 0;
  for_each_span([&](const Span* span) {
    if (!pool.shared() && !(span->lane->pool.id == pool)) return;
    if (span->lane != lane || span->offset != end) {
      lane = span->lane;
      out.push_back({address(span->offset), 0, lane->stream, lane->pool.id, lane->small, {}});
    }
    SegmentView& segment = out.back();
    segment.bytes += span->bytes;
    end = span->end();
    const Address at = address(span->offset);
    if (span->state == SpanState::kSlab) return add_blocks(*span->slab, at, span->bytes, segment.blocks);
    const bool live = span->state == SpanState::kUsed;
    if (!live && span->state != SpanState::kParked) {
      segment.blocks.push_back({at, span->bytes, 0, false, false});
      return;
    }
    const size_t used = round_up(std::max<size_t>(span->requested, 1), kAlignment);
    segment.blocks.push_back({at, used, live ? span->requested : 0, live, true});
    if (used != span->bytes) segment.blocks.push_back({at + used, span->bytes - used, 0, false, false});
  });
  return out;
}

BlockView Heap::block_at(const void* pointer) {
  const Address at = reinterpret_cast<Address>(pointer);
  if (!contains(pointer)) return {};
  for (const SegmentView& segment : segments({})) {
    if (at - segment.address >= segment.bytes) continue;
    for (const BlockView& block : segment.blocks) {
      if (at - block.address < block.bytes) return block;
    }
  }
  return {};
}

void Heap::observe(MallocObserver* observer) {
  const Guard guard(mutex_);
  observer_ = observer;
}

size_t Heap::largest_free(Stream stream) {
  const Guard guard(mutex_);
  return lane_for(stream, false).largest();
}

void Heap::set_limit(size_t bytes) {
  const Guard guard(mutex_);
  limit_ = bytes;
}

size_t Heap::limit() {
  const Guard guard(mutex_);
  return limit_;
}

}  // namespace tem
