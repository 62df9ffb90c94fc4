#include "alloc/heap.hpp"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {
namespace {

std::string text_of(const void* pointer) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", pointer);
  return text;
}

}  // namespace

std::shared_ptr<Heap> Heap::make(std::shared_ptr<Arena> arena, AccountId account, std::string name,
                                 size_t bytes) {
  (void)arena->account(account);  // refuses before the driver is called, which a forked child may not do
  std::shared_ptr<Heap> heap(new Heap(arena, account, std::move(name), bytes));
  heap->writer_ = arena->attach(heap, account);
  return heap;
}

Heap::Heap(std::shared_ptr<Arena> arena, AccountId account, std::string name, size_t bytes)
    : account_(account),
      name_(std::move(name)),
      device_(arena->handles().shared_from_this()),
      range_(std::make_unique<Range>(arena->handles(), bytes)),
      arena_(std::move(arena)) {
  spans_[0].bytes = range_->bytes();
}

void* Heap::allocate(size_t bytes, Stream stream, Deadline deadline) {
  born_.check(name_.c_str());
  if (bytes > range_->bytes()) {
    throw Error(Kind::kOutOfMemory, name_ + ": " + format_bytes(bytes) +
                                        " is more than this heap's addresses, " +
                                        format_bytes(range_->bytes()));
  }
  const size_t rounded = round_up(std::max<size_t>(bytes, 1), kAlignment);
  {
    const Guard guard(mutex_);
    if (void* block = take(rounded, stream)) return block;
  }
  return grow(rounded, stream, deadline);
}

void* Heap::take(size_t bytes, Stream stream) {
  unpark();
  const auto fit = free_.lower_bound({stream, bytes, 0});
  if (fit == free_.end() || std::get<0>(*fit) != stream) return nullptr;
  const auto span = spans_.find(std::get<2>(*fit));
  free_.erase(fit);
  split(span, bytes);
  span->second.state = State::kUsed;
  span->second.fence = Fence();
  live_bytes_ += bytes;
  ++live_blocks_;
  return reinterpret_cast<void*>(address(span->first));
}

/// Cuts a span that is in no list; the rest is listed as what the span was.
void Heap::split(Spans::iterator span, size_t bytes) {
  const size_t rest = span->second.bytes - bytes;
  if (rest == 0) return;
  Span tail = span->second;
  tail.bytes = rest;
  span->second.bytes = bytes;
  const size_t offset = span->first + bytes;
  if (tail.state == State::kFree) free_.insert({tail.stream, rest, offset});
  spans_.emplace_hint(std::next(span), offset, std::move(tail));
}

void* Heap::grow(size_t bytes, Stream stream, Deadline deadline) {
  const std::shared_ptr<Arena> arena = this->arena();
  const size_t granularity = arena->granularity();
  const size_t exact = round_up(bytes, granularity);
  for (;;) {
    size_t ahead = 0;
    {
      const Guard guard(mutex_);
      ahead = round_up(bytes, ahead_extent(mapped_, granularity));
    }
    std::optional<Grant> grant = ahead > exact ? arena->acquire_free(account_, ahead) : std::nullopt;
    if (!grant) grant.emplace(arena->acquire(account_, exact, deadline, Rung::kTrim));

    const Arena::Lock lock = arena->lock();
    Piece piece;
    {
      const Guard guard(mutex_);
      if (void* block = take(bytes, stream)) return block;
      piece = find_absent(grant->bytes(), granularity);
    }
    if (piece.bytes == 0) {
      throw Error(Kind::kOutOfMemory, name_ + ": no run of " + format_bytes(bytes) +
                                          " addresses is left in " + format_bytes(range_->bytes()) +
                                          "; free some blocks");
    }
    std::vector<Piece> extents;
    cover(piece, kMaxExtent, extents);
    std::vector<Place> places;
    for (const Piece& extent : extents) places.push_back({range_.get(), extent});
    arena->map(lock, *grant, places, writer_, stream);

    const Guard guard(mutex_);
    auto span = std::prev(spans_.upper_bound(piece.offset));
    if (span->first != piece.offset) {
      split(span, piece.offset - span->first);
      span = std::next(span);
    }
    split(span, piece.bytes);
    for (const Piece& extent : extents) extents_[extent.offset] = extent.bytes;
    mapped_ += piece.bytes;
    set_free(span, stream, Fence());
    return take(bytes, stream);
  }
}

/// The lowest run of absent space; large runs start where large extents fit.
Piece Heap::find_absent(size_t bytes, size_t granularity) {
  const size_t alignment = std::min(kMaxExtent, floor_pow2(bytes));
  for (const size_t align : {alignment, granularity}) {
    for (const auto& [offset, span] : spans_) {
      if (span.state != State::kAbsent) continue;
      const size_t start = round_up(offset, align);
      if (start + bytes <= offset + span.bytes) return {start, bytes};
    }
  }
  return {};
}

Heap::Spans::iterator Heap::used_at(void* pointer, const char* what) {
  const auto span =
      contains(pointer) ? spans_.find(reinterpret_cast<Address>(pointer) - range_->base()) : spans_.end();
  if (span == spans_.end() || span->second.state != State::kUsed) {
    throw Error(Kind::kInvalid,
                name_ + ": " + what + " of " + text_of(pointer) +
                    ", which is no live block of this heap (freed twice, or never allocated here)");
  }
  return span;
}

void Heap::free(void* pointer) {
  if (!born_.here()) return;
  const Guard guard(mutex_);
  const auto span = used_at(pointer, "free");
  Span& block = span->second;
  // Recorded before anything changes: where the driver refuses, the block lives on.
  Fence own = fence_of_free(span);
  Fence others;
  for (const Stream other : block.others) others.add(mark(other));
  block.others.clear();
  live_bytes_ -= block.bytes;
  --live_blocks_;
  if (others.passed()) {
    set_free(span, block.stream, std::move(own));
    return;
  }
  block.state = State::kParked;
  block.fence = std::move(others);
  block.own = std::move(own);
  parked_.insert(span->first);
}

void Heap::record_stream(void* pointer, Stream stream) {
  const Guard guard(mutex_);
  Span& block = used_at(pointer, "record_stream")->second;
  if (stream == block.stream) return;
  if (std::find(block.others.begin(), block.others.end(), stream) == block.others.end())
    block.others.push_back(stream);
}

void Heap::unpark() {
  for (auto it = parked_.begin(); it != parked_.end();) {
    const auto span = spans_.find(*it);
    if (!span->second.fence.passed()) {
      ++it;
      continue;
    }
    it = parked_.erase(it);
    set_free(span, span->second.stream, std::exchange(span->second.own, Fence()));
  }
}

/// The moment of this free on the block's own stream, where it leaves an extent with nothing that lives,
/// parked blocks aside. An event costs about a microsecond: no other free needs one, since this covers the
/// earlier ones.
Fence Heap::fence_of_free(Spans::const_iterator span) const {
  const Stream stream = span->second.stream;
  const auto gone = [&](Spans::const_iterator other) {
    const State state = other->second.state;
    return other->second.stream == stream && (state == State::kFree || state == State::kParked);
  };
  const auto lowest = std::prev(extents_.upper_bound(span->first));
  const auto beyond = extents_.lower_bound(span->first + span->second.bytes);
  const size_t last_end = std::prev(beyond)->first + std::prev(beyond)->second;
  auto first = span;
  while (first->first > lowest->first && gone(std::prev(first))) --first;
  auto last = span;
  size_t end = last->first + last->second.bytes;
  while (end < last_end && gone(std::next(last))) {
    ++last;
    end = last->first + last->second.bytes;
  }
  Fence fence;
  for (auto extent = lowest; extent != beyond; ++extent) {
    if (extent->first < first->first || extent->first + extent->second > end) continue;
    auto now = mark(stream);
    if (!now->passed()) fence.add(std::move(now));
    break;
  }
  return fence;
}

/// Lists an unlisted span as free, joined with free neighbours of its stream.
void Heap::set_free(Spans::iterator span, Stream stream, Fence fence) {
  const auto swallow = [&](Spans::iterator into, Spans::iterator from) {
    fence.add(from->second.fence);
    into->second.bytes += from->second.bytes;
    spans_.erase(from);
  };
  span->second.state = State::kFree;
  span->second.stream = stream;
  if (const auto next = std::next(span); joins(next, stream)) {
    unlist(next);
    swallow(span, next);
  }
  if (span != spans_.begin() && joins(std::prev(span), stream)) {
    const auto previous = std::prev(span);
    unlist(previous);
    fence.add(previous->second.fence);
    swallow(previous, span);
    span = previous;
  }
  span->second.fence = std::move(fence);
  free_.insert({stream, span->second.bytes, span->first});
}

void Heap::unlist(Spans::iterator span) {
  free_.erase({span->second.stream, span->second.bytes, span->first});
}

template <class Visit>
void Heap::for_each_idle_extent(Visit visit) {
  for (auto& [offset, span] : spans_) {
    if (span.state != State::kFree) continue;
    const size_t end = offset + span.bytes;
    for (auto it = extents_.lower_bound(offset); it != extents_.end() && it->first + it->second <= end;
         ++it) {
      visit(Piece{it->first, it->second}, span);
    }
  }
}

Idle Heap::idle() {
  const Guard guard(mutex_);
  unpark();
  Idle idle;
  for_each_idle_extent(
      [&](Piece extent, Span& span) { (span.fence.passed() ? idle.ready : idle.pending) += extent.bytes; });
  if (keep_) {
    idle.kept = idle.ready + idle.pending;
  } else {
    // Nothing lives in a retired heap, but streams may still use what is parked.
    idle.pending = mapped_ - idle.ready;
  }
  return idle;
}

bool Heap::waiting() {
  {
    const Guard guard(mutex_);
    if (keep_) return false;
  }
  return idle().pending != 0;
}

void Heap::trim(size_t bytes, size_t most, bool kept, std::vector<Leaving>& out) {
  const Guard guard(mutex_);
  if (keep_ && !kept) return;
  unpark();
  std::vector<Piece> going;
  for_each_idle_extent([&](Piece extent, Span& span) {
    if (span.fence.passed()) going.push_back(extent);
  });
  size_t freed = 0;
  // From the top down: allocation fills from the bottom up.
  for (auto extent = going.rbegin(); extent != going.rend() && freed < bytes; ++extent) {
    if (extent->bytes > most - freed) continue;
    freed += extent->bytes;
    auto span = std::prev(spans_.upper_bound(extent->offset));
    unlist(span);
    if (span->first != extent->offset) {
      const Span head = span->second;
      split(span, extent->offset - span->first);
      free_.insert({head.stream, span->second.bytes, span->first});
      span = std::next(span);
      unlist(span);
    }
    split(span, extent->bytes);
    extents_.erase(extent->offset);
    mapped_ -= extent->bytes;
    out.push_back({{{range_.get(), *extent}}});
    join_absent(span);
  }
}

void Heap::join_absent(Spans::iterator span) {
  span->second.state = State::kAbsent;
  span->second.stream = 0;
  span->second.fence = Fence();
  if (const auto next = std::next(span); next != spans_.end() && next->second.state == State::kAbsent) {
    span->second.bytes += next->second.bytes;
    spans_.erase(next);
  }
  if (span != spans_.begin() && std::prev(span)->second.state == State::kAbsent) {
    std::prev(span)->second.bytes += span->second.bytes;
    spans_.erase(span);
  }
}

void Heap::stay(const Leaving& leaving) {
  const Guard guard(mutex_);
  const Piece piece = leaving.places.front().piece;
  auto span = std::prev(spans_.upper_bound(piece.offset));
  if (span->first != piece.offset) {
    split(span, piece.offset - span->first);
    span = std::next(span);
  }
  split(span, piece.bytes);
  extents_[piece.offset] = piece.bytes;
  mapped_ += piece.bytes;
  set_free(span, 0, Fence());
}

std::shared_ptr<Arena> Heap::arena() {
  const Guard guard(mutex_);
  if (!arena_) throw Error(Kind::kClosed, name_ + " has been closed");
  return arena_;
}

size_t Heap::live_bytes() {
  const Guard guard(mutex_);
  return live_bytes_;
}

size_t Heap::live_blocks() {
  const Guard guard(mutex_);
  return live_blocks_;
}

void Heap::retire() {
  if (!born_.here()) return;
  std::shared_ptr<Arena> arena;
  {
    const Guard guard(mutex_);
    if (!arena_) return;
    if (live_blocks_ != 0) {
      throw Error(Kind::kInUse, name_ + " still has " + std::to_string(live_blocks_) + " live blocks of " +
                                    format_bytes(live_bytes_) + "; delete their tensors first");
    }
    keep_ = false;
    arena = std::move(arena_);
  }
  arena->retire(*this);
}

}  // namespace tem
