// Lanes, and the private pools that some of them belong to.
#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "alloc/heap.hpp"
#include "alloc/heap_visits.hpp"
#include "core/error.hpp"

namespace tem {
namespace {

std::string text_of(PoolId pool) {
  return "pool (" + std::to_string(pool.first) + ", " + std::to_string(pool.second) + ")";
}

}  // namespace

Lane& Heap::lane_for(Stream stream, bool small) {
  return lane_of(captures_.empty() ? shared_ : pool_for(stream), stream, small);
}

Lane& Heap::lane_of(Pool& pool, Stream stream, bool small) {
  Lane*& last = pool.last[small ? 1 : 0];
  if (last != nullptr && last->stream == stream) return *last;
  for (const auto& lane : pool.lanes) {
    if (lane->stream == stream && lane->small == small) return *(last = lane.get());
  }
  pool.lanes.push_back(std::make_unique<Lane>(*device_, stream, pool, small, &nodes_));
  return *(last = pool.lanes.back().get());
}

/// The pool begun last whose filter lets the stream through.
Pool& Heap::pool_for(Stream stream) {
  for (auto capture = captures_.rbegin(); capture != captures_.rend(); ++capture) {
    if (capture->filter(stream)) return at(capture->pool);
  }
  return shared_;
}

Pool& Heap::at(PoolId id) {
  if (id.shared()) return shared_;
  const auto found = pools_.find(id);
  if (found != pools_.end()) return *found->second;
  throw Error(Kind::kInvalid, name_ + ": " + text_of(id) + " does not exist, or has been released");
}

Pool& Heap::private_at(PoolId id) {
  if (!id.shared()) return at(id);
  throw Error(Kind::kInvalid, name_ + ": " + text_of(id) + " is everybody's; a private pool has another id");
}

void Heap::create_pool(PoolId id) {
  const Guard guard(mutex_);
  if (id.shared()) (void)private_at(id);
  std::unique_ptr<Pool>& pool = pools_[id];
  if (!pool) {
    pool = std::make_unique<Pool>();
    pool->id = id;
  }
  ++pool->uses;
}

void Heap::begin_pool(PoolId id, std::function<bool(Stream)> filter) {
  create_pool(id);
  const Guard guard(mutex_);
  captures_.push_back({id, std::move(filter)});
}

void Heap::end_pool(PoolId id) {
  const Guard guard(mutex_);
  const auto last = std::find_if(captures_.rbegin(), captures_.rend(),
                                 [&](const Capture& capture) { return capture.pool == id; });
  if (last == captures_.rend())
    throw Error(Kind::kInvalid, name_ + ": " + text_of(id) + " was not begun, or has ended already");
  captures_.erase(std::next(last).base());
}

void Heap::release_pool(PoolId id) {
  std::shared_ptr<Arena> arena;
  {
    const Guard guard(mutex_);
    Pool& pool = private_at(id);
    if (--pool.uses > 0) return;
    pool.released = true;
    // A graph that was replayed may still run on any stream: what the pool holds goes behind all of them,
    // which covers the frees until now as well.
    if (captures_.empty()) pool.all = Mark::everything(*device_);
    for (const auto& lane : pool.lanes) lane->unmarked = false;
    extents_.for_each([&](MappedExtent& extent) {
      if (&extent.lane->pool == &pool) extent.stamp = 0;
    });
    released_.push_back(std::move(pools_.at(id)));
    pools_.erase(id);
    arena = arena_;
  }
  if (arena) arena->collect_quietly();
}

/// Released pools go when their memory has. Called under the arena's lock, so that no growth is between its
/// steps.
void Heap::drop_pools() {
  const auto gone = [this](const std::unique_ptr<Pool>& pool) {
    return std::none_of(extents_.all().begin(), extents_.all().end(),
                        [&](const auto& entry) { return &entry.second.lane->pool == pool.get(); });
  };
  released_.erase(std::remove_if(released_.begin(), released_.end(), gone), released_.end());
}

int Heap::pool_uses(PoolId id) {
  const Guard guard(mutex_);
  const auto found = pools_.find(id);
  return found == pools_.end() ? 0 : found->second->uses;
}

void Heap::set_use_on_oom(PoolId id, bool use) {
  const Guard guard(mutex_);
  at(id).use_on_oom = use;
}

void Heap::set_no_split(PoolId id) {
  const Guard guard(mutex_);
  at(id).no_split = true;
}

std::vector<PlacedBlock> Heap::live_in(PoolId id) {
  const Guard guard(mutex_);
  return live_blocks_of(at(id));
}

std::vector<PlacedBlock> Heap::live_blocks_of(const Pool& pool) {
  std::vector<PlacedBlock> out;
  for_each_span([&](const Span* span) {
    if (&span->lane->pool != &pool) return;
    const Lane& lane = *span->lane;
    const Address start = address(span->offset);
    if (span->state == SpanState::kUsed) {
      out.push_back({start, span->bytes, span->requested, lane.stream, lane.small, 0});
    } else if (span->state == SpanState::kSlab) {
      const size_t bytes = span->slab->block_bytes();
      for (uint32_t block = 0; block < span->slab->capacity(); ++block) {
        if (!span->slab->live(block)) continue;
        out.push_back(
            {start + block * bytes, bytes, span->slab->requested(block), lane.stream, lane.small, start});
      }
    }
  });
  return out;
}

std::vector<Address> Heap::restore(PoolId id, const std::vector<PlacedBlock>& checkpoint) {
  const Guard guard(mutex_);
  Pool& pool = at(id);
  unpark();
  check_restorable(pool, checkpoint);
  std::vector<Address> freed;
  for (const PlacedBlock& block : live_blocks_of(pool)) {
    release(live_at(reinterpret_cast<void*>(block.address), "free"));
    freed.push_back(block.address);
  }
  settle();
  for (const PlacedBlock& block : checkpoint) claim(pool, block);
  return freed;
}

/// What a pool holds stays, so that a checkpoint of it fits unless another stream still uses a block.
void Heap::check_restorable(const Pool& pool, const std::vector<PlacedBlock>& checkpoint) {
  const auto refuse = [&](const std::string& why) {
    throw Error(Kind::kInvalid,
                name_ + ": the checkpoint of " + text_of(pool.id) + " cannot be restored: " + why);
  };
  const auto waits = [&](const auto& entry) {
    const Span* span = entry.second->spot.span;
    return &span->lane->pool == &pool;
  };
  if (std::any_of(parked_.begin(), parked_.end(), waits))
    refuse("other streams still use blocks that were freed");
  for_each_span([&](const Span* span) {
    const bool shared = span->state == SpanState::kSlab ? span->slab->shared() : !span->others.empty();
    if (&span->lane->pool == &pool && shared) refuse("other streams still use live blocks");
  });
  // What the blocks take, slabs as a whole: none of it may be missing, or be taken twice.
  std::map<size_t, Piece> runs;
  std::map<size_t, size_t> slabs;  // offset -> block bytes
  std::set<size_t> blocks;
  for (const PlacedBlock& block : checkpoint) {
    const size_t offset = block.address - range_->base();
    const size_t start = block.slab == 0 ? offset : block.slab - range_->base();
    if (start >= range_->bytes() || block.bytes > range_->bytes() - start)
      refuse("it names a block that is not of this heap");
    const bool in_slab = block.slab != 0 && block.small && block.bytes != 0 && block.bytes <= kSlabBlock &&
                         class_bytes(size_class_of(block.bytes)) == block.bytes && offset >= start &&
                         (offset - start) % block.bytes == 0 &&
                         offset - start + block.bytes <= slab_bytes(size_class_of(block.bytes));
    const size_t unit = SpanMap::unit(block.small);
    const bool is_span = block.slab == 0 && block.bytes != 0 && block.bytes % unit == 0;
    const bool placed = start % unit == 0 && spans_.is_small(start) == block.small;
    if ((!in_slab && !is_span) || !placed || block.requested > block.bytes)
      refuse("it names a block that no malloc made");
    const size_t bytes = in_slab ? slab_bytes(size_class_of(block.bytes)) : block.bytes;
    for (size_t at = start; at < start + bytes; at = extents_.over(at)->piece.end()) {
      const MappedExtent* extent = extents_.over(at);
      if (extent == nullptr || &extent->lane->pool != &pool || extent->lane->stream != block.stream)
        refuse("it names memory that the pool does not hold");
    }
    const bool agrees = !in_slab || slabs.emplace(start, block.bytes).first->second == block.bytes;
    const bool again = !blocks.insert(offset).second;
    const bool other = runs.emplace(start, Piece{start, bytes}).first->second.bytes != bytes;
    if (!agrees || again || other) refuse("two of its blocks overlap");
  }
  size_t end = 0;
  for (const auto& [start, run] : runs) {
    if (start < end) refuse("two of its blocks overlap");
    end = run.end();
  }
}

void Heap::claim(Pool& pool, const PlacedBlock& block) {
  Lane& lane = lane_of(pool, block.stream, block.small);
  const size_t offset = block.address - range_->base();
  if (block.slab == 0) {
    Span* span = carve(lane, offset, block.bytes);
    span->state = SpanState::kUsed;
    span->requested = block.requested;
  } else {
    const size_t start = block.slab - range_->base();
    const size_t number = size_class_of(block.bytes);
    Span* span = spans_.at(start);
    if (span == nullptr || span->state != SpanState::kSlab)
      make_slab(lane, span = carve(lane, start, slab_bytes(number)), number);
    Slab* slab = span->slab.get();
    slab->claim(slab->at(offset - start), block.requested);
    if (slab->full()) lane.remove_slab(slab);
  }
  count_taken(lane, block.requested);
  tell(MallocEvent::Action::kAllocate, block.address, block.requested, lane);
}

/// The free span that has a run inside it, or null.
Span* Heap::free_over(Lane& lane, size_t offset, size_t bytes) {
  Span* span = nullptr;
  lane.for_each_free([&](Span* free) {
    if (free->offset <= offset && offset + bytes <= free->end()) span = free;
  });
  return span;
}

/// Makes a span of its own, in no list, of a run that lies inside a free one.
Span* Heap::carve(Lane& lane, size_t offset, size_t bytes) {
  Span* span = free_over(lane, offset, bytes);
  lane.unlist(span);
  if (offset != span->offset) {
    Span* rest = spans_.split(span, offset - span->offset);
    lane.list(span);
    span = rest;
  }
  if (Span* rest = spans_.split(span, bytes)) lane.list(rest);
  return span;
}

}  // namespace tem
