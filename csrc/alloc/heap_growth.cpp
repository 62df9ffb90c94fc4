// How a heap gets memory: which addresses to map so that a block fits, and the two steps of a growth.
#include <algorithm>
#include <utility>

#include "alloc/heap.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {
namespace {

/// Growth ahead of need stops here: what a last growth leaves unused is less than what torch's expandable
/// segments leave of their 20 MiB pages.
constexpr size_t kMostAhead = 16 * kMiB;

}  // namespace

void* Heap::grow(size_t rounded, size_t requested, Stream stream, Deadline deadline) {
  const std::shared_ptr<Arena> arena = this->arena();
  const bool small = rounded <= kSmallBlock;
  const size_t need =
      rounded <= kSlabBlock ? slab_bytes(size_class_of(rounded)) : round_up(rounded, SpanMap::unit(small));
  for (;;) {
    size_t exact = 0;
    size_t ahead = 0;
    size_t unit = granularity_;
    {
      const Guard guard(mutex_);
      Lane& lane = lane_for(stream, small);
      drop_empty_slabs(lane);
      if (void* block = take(lane, rounded, requested)) return block;
      // Small blocks get small extents: each comes free only when all blocks on it have gone.
      if (!small) unit = ahead_extent(extents_.mapped(), granularity_, kMostAhead);
      exact = plan(lane, need, granularity_).bytes;
      ahead = plan(lane, need, unit).bytes;
    }
    if (exact == 0) {
      throw Error(Kind::kOutOfMemory, name_ + ": no run of " + format_bytes(need) + " addresses is left in " +
                                          format_bytes(range_->bytes()) + "; free some blocks");
    }
    check_limit(*arena, exact);
    const bool may = ahead > exact && within_limit(ahead);
    std::optional<Grant> grant = may ? arena->acquire_free(account_, ahead) : std::nullopt;
    const bool generous = grant.has_value();
    if (!generous) grant.emplace(arena->acquire(account_, exact, deadline, Rung::kTrim));

    const Arena::Lock lock = arena->lock();
    Piece piece;
    Lane* lane = nullptr;  // stays: pools are dropped under the arena's lock alone
    {
      const Guard guard(mutex_);
      lane = &lane_for(stream, small);
      if (void* block = take(*lane, rounded, requested)) return block;
      piece = plan(*lane, need, generous ? unit : granularity_);
    }
    // What was free beside the run, or below the limit, may have been taken meanwhile.
    if (piece.bytes > grant->bytes() || !within_limit(piece.bytes)) continue;
    std::vector<Piece> extents;
    cover(piece, kMaxExtent, extents);
    std::vector<Place> places;
    for (const Piece& extent : extents) places.push_back({range_.get(), extent});
    arena->map(lock, *grant, places, writer_, stream);

    const Guard guard(mutex_);
    // A memset may be queued: what no block is taken from waits for it as for a free.
    add_extents(*lane, piece, extents, lane->stamp());
    lane->unmarked = true;
    if (void* block = take(*lane, rounded, requested)) return block;
  }
}

/// What to map so that the lane has a run of `bytes`: the least, and of equals the lowest. Free memory of the
/// lane at either end of an absent run counts; a run that has none starts where large extents fit.
Piece Heap::plan(Lane& lane, size_t bytes, size_t unit) {
  const auto free_bytes = [&](const Span* span) {
    const bool ours = span != nullptr && span->state == SpanState::kFree && span->lane == &lane;
    return ours ? span->bytes : 0;
  };
  Piece best;
  const auto offer = [&](Piece piece) {
    if (best.bytes == 0 || piece.bytes < best.bytes) best = piece;
  };
  const auto end = absent_.lower_bound(spans_.region_end(lane.small));
  for (auto it = absent_.lower_bound(spans_.region_begin(lane.small)); it != end; ++it) {
    const Span& hole = *it->second;
    const size_t left = free_bytes(spans_.before(&hole));
    const size_t right = free_bytes(spans_.after(&hole));
    if (left + hole.bytes + right < bytes) continue;
    const auto rounded = [&](size_t need) { return std::min(round_up(need, unit), hole.bytes); };
    if (left + hole.bytes < bytes && right + hole.bytes < bytes) {
      offer({hole.offset, hole.bytes});
    } else if (left >= right || right + hole.bytes < bytes) {
      const size_t need = rounded(bytes - left);
      const size_t aligned = round_up(hole.offset, std::min(kMaxExtent, floor_pow2(need)));
      const bool fits = left == 0 && aligned + need <= hole.end();
      offer({fits ? aligned : hole.offset, need});
    } else {
      const size_t need = rounded(bytes - right);
      offer({hole.end() - need, need});
    }
  }
  return best;
}

/// Makes a span of its own of a run inside an absent one, and lists the rest.
Span* Heap::cut_absent(Piece piece) {
  const auto found = std::prev(absent_.upper_bound(piece.offset));
  Span* span = found->second;
  absent_.erase(found);
  if (piece.offset != span->offset) {
    Span* rest = spans_.split(span, piece.offset - span->offset);
    absent_[span->offset] = span;
    span = rest;
  }
  if (Span* rest = spans_.split(span, piece.bytes)) absent_[rest->offset] = rest;
  return span;
}

void Heap::add_extents(Lane& lane, Piece piece, const std::vector<Piece>& extents, uint64_t stamp) {
  Span* span = cut_absent(piece);
  span->lane = &lane;
  for (const Piece& extent : extents) {
    extents_.add(extent, &lane, stamp);
    tell(MallocEvent::Action::kMap, address(extent.offset), extent.bytes, lane);
  }
  count_segments(lane.pool.id, lane.small, static_cast<int64_t>(extents.size()),
                 static_cast<int64_t>(piece.bytes), true);
  list_free(span);
}

bool Heap::within_limit(size_t bytes) {
  const Guard guard(mutex_);
  return extents_.mapped() <= limit_ && bytes <= limit_ - extents_.mapped();
}

/// Error{kOutOfMemory} if the limit does not allow so many more bytes, after what is idle has gone.
void Heap::check_limit(Arena& arena, size_t bytes) {
  if (within_limit(bytes)) return;
  arena.trim(account_);
  if (within_limit(bytes)) return;
  const Guard guard(mutex_);
  throw Error(Kind::kOutOfMemory, name_ + ": " + format_bytes(bytes) + " more would exceed the limit of " +
                                      format_bytes(limit_) + " set for it, of which " +
                                      format_bytes(extents_.mapped()) +
                                      " is mapped; free some blocks, or raise the limit");
}

}  // namespace tem
