#include "alloc/heap.hpp"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "alloc/directory.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {
namespace {

/// Regions of the reservation, in parts of the device's memory. Small blocks seldom are a large part of it.
constexpr size_t kSmallFactor = 1;
constexpr size_t kLargeFactor = 4;
/// How long an allocation waits for fences of memory that is already free. malloc has nobody to ask.
constexpr double kFenceWait = 1.0;  // seconds

size_t region(Arena& arena, size_t factor) {
  return round_up(checked_mul(arena.handles().backend->memory_info().total, factor), kMaxExtent);
}

std::string text_of(const void* pointer) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", pointer);
  return text;
}

size_t rounded_of(size_t requested) { return round_up(std::max<size_t>(requested, 1), kAlignment); }

}  // namespace

std::shared_ptr<Heap> Heap::make(std::shared_ptr<Arena> arena, AccountId account, std::string name) {
  (void)arena->account(account);  // refuses before the driver is called, which a forked child may not do
  std::shared_ptr<Heap> heap(new Heap(arena, account, std::move(name)));
  heap->writer_ = arena->attach(heap, account);
  directory().add(heap->range_->base(), heap->range_->bytes(), heap.get());
  return heap;
}

Heap::Heap(std::shared_ptr<Arena> arena, AccountId account, std::string name)
    : account_(account),
      name_("the blocks of " + std::move(name)),
      device_(arena->handles().shared_from_this()),
      granularity_(arena->granularity()),
      host_(arena->device().backend == "host"),
      device_ordinal_(arena->device().ordinal),
      range_(std::make_unique<Range>(arena->handles(),
                                     region(*arena, kSmallFactor) + region(*arena, kLargeFactor))),
      arena_(arena),
      spans_(region(*arena, kSmallFactor), range_->bytes() - region(*arena, kSmallFactor)),
      extents_(range_->bytes(), granularity_) {
  for (const bool small : {true, false}) {
    const size_t begin = spans_.region_begin(small);
    absent_[begin] = spans_.at(begin);
  }
}

void* Heap::allocate(size_t bytes, Stream stream) {
  born_.check(name_.c_str());
  if (bytes > spans_.region_end(false) - spans_.region_begin(false)) {
    throw Error(Kind::kOutOfMemory, name_ + ": " + format_bytes(bytes) +
                                        " is more than this heap's addresses, " +
                                        format_bytes(range_->bytes()));
  }
  const size_t rounded = rounded_of(bytes);
  {
    const Guard guard(mutex_);
    if (void* block = take(lane_for(stream, rounded <= kSmallBlock), rounded, bytes)) return block;
  }
  return grow(rounded, bytes, stream, deadline_in(kFenceWait));
}

bool Heap::allocate_at(void* pointer, size_t bytes, Stream stream) {
  born_.check(name_.c_str());
  const Guard guard(mutex_);
  if (away_) return false;
  if (!parked_.empty()) unpark();
  const size_t rounded = rounded_of(bytes);
  Lane& lane = lane_for(stream, rounded <= kSmallBlock);
  const size_t offset = offset_of(pointer);
  const size_t begin = spans_.region_begin(lane.small);
  if (!contains(pointer) || offset < begin || offset >= spans_.region_end(lane.small)) return false;
  if (rounded <= kSlabBlock) {
    if (!take_in_slab(lane, offset, rounded, bytes)) return false;
  } else {
    while (Span* hot = lane.pop_hot()) set_free(hot);
    const size_t unit = SpanMap::unit(lane.small);
    const size_t whole = round_up(rounded, unit);
    if ((offset - begin) % unit != 0 || free_over(lane, offset, whole) == nullptr) return false;
    Span* span = carve(lane, offset, whole);
    span->state = SpanState::kUsed;
    span->requested = bytes;
  }
  count_taken(lane, bytes);
  tell(MallocEvent::Action::kAllocate, address(offset), bytes, lane);
  return true;
}

bool Heap::take_in_slab(Lane& lane, size_t offset, size_t rounded, size_t requested) {
  Span* span = spans_.at(offset);
  if (span == nullptr || span->state != SpanState::kSlab || span->lane != &lane) return false;
  Slab* slab = span->slab.get();
  const uint32_t block = slab->at(offset - span->offset);
  if (slab->number() != size_class_of(rounded) || block == Slab::kNone || !slab->available(block)) {
    return false;
  }
  slab->came_back = slab->kept;
  slab->kept = slab->stamped = false;
  slab->claim(block, requested);
  if (slab->full()) lane.remove_slab(slab);
  return true;
}

void* Heap::take(Lane& lane, size_t rounded, size_t requested) {
  if (away_) throw Error(Kind::kInUse, name_ + " have been put away; bring them back before you allocate");
  if (!parked_.empty()) unpark();
  Spot spot;
  if (rounded <= kSlabBlock) {
    const size_t number = size_class_of(rounded);
    if (lane.slabs(number) == nullptr) {
      Span* span = take_span(lane, slab_bytes(number));
      if (span == nullptr) return nullptr;
      make_slab(lane, span, number);
    }
    Slab* slab = lane.slabs(number);
    slab->came_back = slab->kept;
    slab->kept = slab->stamped = false;
    spot = {slab->span(), slab->take(requested)};
    if (slab->full()) lane.remove_slab(slab);
  } else {
    Span* span = take_span(lane, round_up(rounded, SpanMap::unit(lane.small)));
    if (span == nullptr) return nullptr;
    span->state = SpanState::kUsed;
    span->requested = requested;
    spot = {span, Slab::kNone};
  }
  count_taken(lane, requested);
  const Address at = address_of(spot);
  tell(MallocEvent::Action::kAllocate, at, requested, lane);
  return reinterpret_cast<void*>(at);
}

Span* Heap::take_span(Lane& lane, size_t bytes) {
  if (Span* hot = lane.take_hot(bytes)) {
    lane.hit();
    return hot;
  }
  if (bytes == lane.last_freed) {
    lane.hit();
  } else {
    lane.miss();
  }
  lane.last_freed = 0;
  while (Span* hot = lane.pop_hot()) set_free(hot);
  const auto absent = [](const Span* other) {
    return other != nullptr && other->state == SpanState::kAbsent ? other->bytes : 0;
  };
  Span* span = lane.take_fit(bytes, [&](const Span* free) {
    return absent(spans_.before(free)) + free->bytes + absent(spans_.after(free));
  });
  if (span == nullptr || lane.pool.no_split) return span;
  if (Span* rest = spans_.split(span, bytes)) lane.list(rest);
  return span;
}

void Heap::make_slab(Lane& lane, Span* span, size_t number) {
  span->state = SpanState::kSlab;
  span->slab = std::make_unique<Slab>(span, number);
  spans_.tag_inside(span);
  lane.add_slab(span->slab.get());
}

void Heap::free(void* pointer) {
  if (!born_.here()) return;
  const Guard guard(mutex_);
  release(live_at(pointer, "free"));
}

void Heap::release(Spot spot) {
  Span* span = spot.span;
  const Lane& lane = *span->lane;
  const size_t requested = requested_of(spot);
  const size_t rounded = rounded_of(requested);
  stats_.allocation.sub(lane.small, 1);
  stats_.allocated_bytes.sub(lane.small, static_cast<int64_t>(rounded));
  stats_.requested_bytes.sub(lane.small, static_cast<int64_t>(requested));
  tell(MallocEvent::Action::kFree, address_of(spot), requested, lane);
  if (!shared_runs_.empty()) shared_runs_.remove(address_of(spot) - range_->base());
  if (spot.in_slab() ? span->slab->shared() : !span->others.empty()) {
    std::vector<Stream> others =
        spot.in_slab() ? span->slab->take_others(spot.block) : std::exchange(span->others, {});
    if (!others.empty()) return park(spot, std::move(others));
  }
  put(spot);
}

/// What is free now for its stream: the end of every free.
void Heap::put(Spot spot) {
  Lane& lane = *spot.span->lane;
  const size_t requested = requested_of(spot);
  stats_.active.sub(lane.small, 1);
  stats_.active_bytes.sub(lane.small, static_cast<int64_t>(rounded_of(requested)));
  tell(MallocEvent::Action::kFreed, address_of(spot), requested, lane);
  if (spot.in_slab()) return put_in_slab(spot);
  Span* span = spot.span;
  if (span->state == SpanState::kParked) {
    list_free(span);  // stamped when it was parked
  } else if (lane.expects(span->bytes)) {
    lane.set_hot(span);
  } else {
    lane.last_freed = span->bytes;
    set_free(span);
  }
}

void Heap::put_in_slab(Spot spot) {
  Slab* slab = spot.span->slab.get();
  const bool was_live = slab->live(spot.block);
  if (slab->full()) spot.span->lane->add_slab(slab);
  slab->put(spot.block);
  // One empty slab stays, so that a single block that comes and goes does not make and drop one each time;
  // once it has come back, it is as a hot block.
  if (slab->empty() && (slab->previous != nullptr || slab->next != nullptr)) return drop_slab(slab);
  slab->kept = slab->empty();
  if (was_live && slab->deserted() && !slab->came_back) desert(slab);
}

/// The last live block of a slab has gone: that is the slab's fence.
void Heap::desert(Slab* slab) {
  Span* span = slab->span();
  slab->stamped = true;
  stamp(span);
  if (leaves_extent_idle(span, span->offset, span->end())) mark(*span->lane);
}

void Heap::drop_slab(Slab* slab) {
  Span* span = slab->span();
  const bool stamped = slab->stamped;
  span->lane->remove_slab(slab);
  span->slab.reset();
  if (stamped) {
    list_free(span);
  } else {
    set_free(span);
  }
}

/// Lists a span that has just been freed, and marks its stream if that leaves an extent idle.
void Heap::set_free(Span* span) {
  const size_t begin = span->offset;
  const size_t end = span->end();
  Lane& lane = *span->lane;
  stamp(span);
  const Span* joined = list_free(span);
  if (leaves_extent_idle(joined, begin, end)) mark(lane);
}

/// Lists a span as free, joined with free neighbours of its lane.
Span* Heap::list_free(Span* span) {
  Lane& lane = *span->lane;
  span->state = SpanState::kFree;
  const auto joins = [&](const Span* other) {
    return other != nullptr && other->state == SpanState::kFree && other->lane == &lane;
  };
  if (Span* next = spans_.after(span); joins(next)) {
    lane.unlist(next);
    spans_.join(span, next);
  }
  if (Span* previous = spans_.before(span); joins(previous)) {
    lane.unlist(previous);
    spans_.join(previous, span);
    span = previous;
  }
  lane.list(span);
  return span;
}

void Heap::stamp(const Span* span) {
  Lane& lane = *span->lane;
  extents_.touching(span->offset, span->end(), [&](MappedExtent& extent) { extent.stamp = lane.stamp(); });
  lane.unmarked = true;
}

/// Whether an extent that touches `[begin, end)` of a free span has nothing left that lives; parked and hot
/// blocks and slabs without live ones count as gone, for their stream has let them go.
bool Heap::leaves_extent_idle(const Span* span, size_t begin, size_t end) {
  const auto gone = [&](const Span* other) {
    if (other == nullptr || other->lane != span->lane) return false;
    return other->state == SpanState::kFree || other->state == SpanState::kParked ||
           other->state == SpanState::kHot || (other->state == SpanState::kSlab && other->slab->deserted());
  };
  const MappedExtent* first = extents_.over(begin);
  const MappedExtent* last = extents_.over(end - 1);
  size_t low = span->offset;
  for (const Span* at = span; low > first->piece.offset && gone(at = spans_.before(at));) low = at->offset;
  size_t high = span->end();
  for (const Span* at = span; high < last->piece.end() && gone(at = spans_.after(at));) high = at->end();
  bool idle = false;
  extents_.touching(begin, end, [&](const MappedExtent& extent) {
    idle |= extent.piece.offset >= low && extent.piece.end() <= high;
  });
  return idle;
}

/// What stays needs no mark; within a capture the driver allows none.
void Heap::mark(Lane& lane) {
  if (!stays(lane.pool) && captures_.empty()) lane.mark();
}

void Heap::record_stream(void* pointer, Stream stream) {
  const Guard guard(mutex_);
  const Spot spot = live_at(pointer, "record_stream");
  if (stream == spot.span->lane->stream) return;
  std::vector<Stream>& others = spot.in_slab() ? spot.span->slab->others(spot.block) : spot.span->others;
  if (std::find(others.begin(), others.end(), stream) == others.end()) others.push_back(stream);
}

Heap::Spot Heap::live_at(const void* pointer, const char* what) {
  if (contains(pointer)) {
    const size_t offset = offset_of(pointer);
    if (Span* span = spans_.at(offset)) {
      if (span->state == SpanState::kUsed) return {span, Slab::kNone};
      if (span->state == SpanState::kSlab) {
        const uint32_t block = span->slab->at(offset - span->offset);
        if (block != Slab::kNone && span->slab->live(block)) return {span, block};
      }
    }
  }
  throw Error(Kind::kInvalid, name_ + ": " + what + " of " + text_of(pointer) +
                                  ", which is no live block of this heap (freed twice, or never allocated "
                                  "here)");
}

Address Heap::address_of(Spot spot) const {
  const size_t inside = spot.in_slab() ? spot.block * spot.span->slab->block_bytes() : 0;
  return address(spot.span->offset + inside);
}

size_t Heap::requested_of(Spot spot) const {
  return spot.in_slab() ? spot.span->slab->requested(spot.block) : spot.span->requested;
}

void Heap::count_taken(const Lane& lane, size_t requested) {
  const auto rounded = static_cast<int64_t>(rounded_of(requested));
  stats_.allocation.add(lane.small, 1);
  stats_.active.add(lane.small, 1);
  stats_.allocated_bytes.add(lane.small, rounded);
  stats_.active_bytes.add(lane.small, rounded);
  stats_.requested_bytes.add(lane.small, static_cast<int64_t>(requested));
}

void Heap::tell(MallocEvent::Action action, Address at, size_t bytes, const Lane& lane) {
  if (observer_ != nullptr) observer_->on({action, at, bytes, lane.stream, lane.pool.id});
}

std::shared_ptr<Arena> Heap::arena() {
  const Guard guard(mutex_);
  if (!arena_) throw Error(Kind::kClosed, name_ + " has been closed");
  return arena_;
}

}  // namespace tem
