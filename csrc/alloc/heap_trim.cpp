// What a heap gives back: whole extents on which nothing lives, behind the frees that left them so.
#include <algorithm>
#include <utility>
#include <vector>

#include "alloc/directory.hpp"
#include "alloc/heap.hpp"
#include "alloc/heap_visits.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {

/// Lists what was set aside for reuse, and marks what no mark covers yet.
void Heap::settle() {
  unpark();
  for_each_lane([this](Lane& lane) {
    while (Span* hot = lane.pop_hot()) set_free(hot);
    drop_empty_slabs(lane);
    if (lane.unmarked) mark(lane);
  });
  for (const auto& pool : released_) {
    if (!pool->all && captures_.empty()) pool->all = Mark::everything(*device_);
  }
}

void Heap::drop_empty_slabs(Lane& lane) {
  for (size_t number = 0; lane.small && number < kSizeClasses; ++number) {
    for (Slab *slab = lane.slabs(number), *next = nullptr; slab != nullptr; slab = next) {
      next = slab->next;
      if (slab->empty()) drop_slab(slab);
    }
  }
}

Heap::Fence Heap::fence_of(const MappedExtent& extent) {
  Lane& lane = *extent.lane;
  const Pool& pool = lane.pool;
  if (extent.stamp >= lane.stamp() || (pool.released && !pool.all)) return Fence::kUnmarked;
  const bool passed = (!pool.released || pool.all->passed()) && lane.passed(extent.stamp);
  return passed ? Fence::kPassed : Fence::kPending;
}

/// Visits idle extents as (span, piece, lane, fence).
template <class Visit>
void Heap::for_each_idle_extent(Visit visit) {
  for_each_lane([&](Lane& lane) {
    if (stays(lane.pool)) return;
    lane.for_each_free([&](Span* span) {
      extents_.within(span->offset, span->end(),
                      [&](const MappedExtent& extent) { visit(span, extent.piece, lane, fence_of(extent)); });
    });
  });
}

Idle Heap::idle() {
  const Guard guard(mutex_);
  if (away_) return idle_away();
  settle();
  Idle idle;
  for_each_idle_extent([&](Span*, Piece piece, const Lane& lane, Fence fence) {
    if (fence == Fence::kUnmarked) return;
    (fence == Fence::kPassed ? idle.ready : idle.pending) += piece.bytes;
    if (!lane.pool.released) idle.kept += piece.bytes;
  });
  if (!keep_) {
    // Nothing lives in a retired heap, but streams may still use what is parked.
    idle.pending = extents_.mapped() - idle.ready;
    idle.kept = 0;
  }
  return idle;
}

bool Heap::waiting() {
  const Guard guard(mutex_);
  if (away_) return extents_.mapped() != gone_bytes_;
  if (!keep_) return extents_.mapped() != 0;
  return !released_.empty();  // a free wakes no thread, and what outlived its pool is to go by itself
}

/// Whether free extents wait for marks that have been made.
bool Heap::comes_free() {
  const Guard guard(mutex_);
  if (away_) return false;
  settle();
  bool any = false;
  for_each_idle_extent([&](Span*, Piece, Lane&, Fence fence) { any |= fence == Fence::kPending; });
  return any;
}

void Heap::trim(size_t bytes, size_t most, bool kept, std::vector<Leaving>& out) {
  struct Going {
    Span* span;
    Piece piece;
    Lane* lane;
  };
  const Guard guard(mutex_);
  if (away_) return trim_away(bytes, most, out);
  if (keep_ && !kept && released_.empty()) return;
  drop_pools();  // not those whose last extents leave now: the driver may refuse, and then they stay
  settle();
  std::vector<Going> going;
  for_each_idle_extent([&](Span* span, Piece piece, Lane& lane, Fence fence) {
    if (fence == Fence::kPassed && (kept || !keep_ || lane.pool.released))
      going.push_back({span, piece, &lane});
  });
  // From the top down: allocation fills from the bottom up. So cut, a span's lower part stays what it was.
  std::sort(going.begin(), going.end(),
            [](const Going& a, const Going& b) { return a.piece.offset > b.piece.offset; });
  size_t freed = 0;
  for (const Going& one : going) {
    if (freed >= bytes) break;
    if (one.piece.bytes > most - freed) continue;
    freed += one.piece.bytes;
    out.push_back({{{range_.get(), one.piece}}, reinterpret_cast<uint64_t>(one.lane)});
    drop_extent(one.span, one.piece);
  }
}

void Heap::drop_extent(Span* span, Piece piece) {
  Lane& lane = *span->lane;
  lane.unlist(span);
  if (span->end() != piece.end()) {
    Span* rest = spans_.split(span, piece.end() - span->offset);
    lane.list(rest);
  }
  if (span->offset != piece.offset) {
    Span* gone = spans_.split(span, piece.offset - span->offset);
    lane.list(span);
    span = gone;
  }
  extents_.remove(piece.offset);
  count_segments(lane.pool.id, lane.small, 1, static_cast<int64_t>(piece.bytes), false);
  tell(MallocEvent::Action::kUnmap, address(piece.offset), piece.bytes, lane);
  set_absent(span);
}

void Heap::set_absent(Span* span) {
  span->state = SpanState::kAbsent;
  span->lane = nullptr;
  const auto absent = [](const Span* other) {
    return other != nullptr && other->state == SpanState::kAbsent;
  };
  if (Span* next = spans_.after(span); absent(next)) {
    absent_.erase(next->offset);
    spans_.join(span, next);
  }
  if (Span* previous = spans_.before(span); absent(previous)) {
    spans_.join(previous, span);
    return;
  }
  absent_[span->offset] = span;
}

void Heap::stay(const Leaving& leaving) {
  const Guard guard(mutex_);
  const Piece piece = leaving.places.front().piece;
  if (MappedExtent* extent = extents_.over(piece.offset)) return stay_away(*extent);
  add_extents(*reinterpret_cast<Lane*>(leaving.token), piece, {piece}, 0);
}

void Heap::retire() {
  if (!born_.here()) return;
  std::shared_ptr<Arena> arena;
  {
    const Guard guard(mutex_);
    if (!arena_) return;
    if (const int64_t live = stats_.allocation.all.current - provided_blocks_; live != 0) {
      const int64_t bytes = stats_.allocated_bytes.all.current - provided_bytes_;
      throw Error(Kind::kInUse, name_ + " still has " + std::to_string(live) + " live blocks of " +
                                    format_bytes(static_cast<size_t>(bytes)) +
                                    "; delete their tensors first");
    }
    keep_ = false;
    arena = std::move(arena_);
  }
  directory().remove(this);
  arena->retire(*this);
}

}  // namespace tem
