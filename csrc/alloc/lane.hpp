// What is free for one stream in one pool, small or large. Blocks freed on a stream may be used again at once
// by later work on it, so free memory is kept by stream, and an extent belongs to one lane.
//
// Marks. A free is stamped with the number of the lane's next mark; memory has come free for everybody when
// the mark of its stamp has passed. A mark is an event on the stream and costs a driver call, so one is
// recorded only by a free that leaves a whole extent idle: it covers all frees before it.
//
// Hot blocks. A program that allocates and frees the same size in turn would record a mark each time, and cut
// and join the same spans. After an allocation that found a hot block of exactly its size, the next free is
// expected to be followed by such another: it is set aside, unlisted and unmarked. The first allocation that
// finds none lists them all. Only as many are set aside as were found in a row, so that at rest what waits
// for a later mark than its own is what was being used again just before.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <iterator>
#include <memory>
#include <memory_resource>
#include <set>
#include <utility>

#include "alloc/malloc.hpp"
#include "alloc/span.hpp"
#include "arena/fence.hpp"

namespace tem {

struct Pool;

class Lane {
 public:
  Lane(Device& device, Stream the_stream, Pool& the_pool, bool is_small, std::pmr::memory_resource* nodes)
      : stream(the_stream), pool(the_pool), small(is_small), device_(device), free_(nodes) {}
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  const Stream stream;
  Pool& pool;
  const bool small;

  // Free spans.
  void list(Span* span) { free_.insert({span->bytes, span->offset, span}); }
  void unlist(Span* span) { free_.erase({span->bytes, span->offset, span}); }
  /// The smallest that fits, the lowest of those; unlisted. Null if none does. `reach` says how large a span
  /// can become by growing over absent memory beside it, and that is how large it counts: what is cut from
  /// the edge of what is mapped is missing from the next block that is larger than all before it.
  template <class Reach>
  Span* take_fit(size_t bytes, Reach reach) {
    auto fit = free_.lower_bound({bytes, 0, nullptr});
    if (fit == free_.end()) return nullptr;
    size_t reached = reach(fit->span);
    for (auto next = std::next(fit); reached > fit->bytes && next != free_.end(); ++next) {
      const size_t further = reach(next->span);
      if (further >= reached) break;
      fit = next;
      reached = further;
    }
    Span* span = fit->span;
    free_.erase(fit);
    return span;
  }
  size_t largest() const { return free_.empty() ? 0 : free_.rbegin()->bytes; }
  template <class Visit>
  void for_each_free(Visit visit) const {
    for (const Fit& fit : free_) visit(fit.span);
  }

  // Hot blocks.
  bool expects(size_t bytes) const {
    return hot_count_ < credit_ && (hot_count_ == 0 || hot_bytes_ + bytes <= kHotBytes);
  }
  void set_hot(Span* span) {
    span->state = SpanState::kHot;
    hot_[hot_count_++] = span;
    hot_bytes_ += span->bytes;
  }
  /// The newest hot block of exactly so many bytes, or null.
  Span* take_hot(size_t bytes) {
    for (size_t i = hot_count_; i-- > 0;) {
      Span* span = hot_[i];
      if (span->bytes != bytes) continue;
      hot_[i] = hot_[--hot_count_];
      hot_bytes_ -= bytes;
      return span;
    }
    return nullptr;
  }
  Span* pop_hot() {
    if (hot_count_ == 0) return nullptr;
    Span* span = hot_[--hot_count_];
    hot_bytes_ -= span->bytes;
    return span;
  }
  /// What was just allocated was the last to be freed.
  void hit() { credit_ = credit_ < kHot ? credit_ + 1 : kHot; }
  void miss() { credit_ = 0; }

  /// Remembers the last listed block's size, by which the first hit of a row is told.
  size_t last_freed = 0;

  // Slabs with room, by class.
  Slab*& slabs(size_t number) { return slabs_[number]; }
  void add_slab(Slab* slab) {
    Slab*& head = slabs_[slab->number()];
    slab->previous = nullptr;
    slab->next = head;
    if (head != nullptr) head->previous = slab;
    head = slab;
  }
  void remove_slab(Slab* slab) {
    if (slab->next != nullptr) slab->next->previous = slab->previous;
    (slab->previous != nullptr ? slab->previous->next : slabs_[slab->number()]) = slab->next;
  }

  // Marks.
  uint64_t stamp() const { return next_mark_; }
  /// Whether frees have been stamped that no mark covers yet.
  bool unmarked = false;
  /// False if the driver refuses, as while the stream is captured: tried again when somebody asks.
  bool mark() noexcept;
  bool passed(uint64_t stamp) noexcept {
    if (stamp > passed_) poll();
    return stamp <= passed_;
  }

 private:
  static constexpr size_t kHot = 8;
  static constexpr size_t kHotBytes = 256 * kMiB;
  /// Marks kept before somebody asks whether they have passed: each holds a driver's event.
  static constexpr size_t kMarksKept = 64;

  struct Fit {
    size_t bytes = 0;
    size_t offset = 0;
    Span* span = nullptr;
    bool operator<(const Fit& other) const {
      return bytes != other.bytes ? bytes < other.bytes : offset < other.offset;
    }
  };

  void poll() noexcept;

  Device& device_;
  std::pmr::set<Fit> free_;
  std::array<Span*, kHot> hot_{};
  size_t hot_count_ = 0;
  size_t hot_bytes_ = 0;
  size_t credit_ = 0;
  std::array<Slab*, kSizeClasses> slabs_{};
  uint64_t next_mark_ = 1;
  uint64_t passed_ = 0;
  std::deque<std::pair<uint64_t, std::unique_ptr<Mark>>> marks_;
};

/// The lanes of one pool. The shared pool has no id, no uses and no end.
struct Pool {
  PoolId id;
  int uses = 0;
  bool released = false;  // no graph will touch its memory again
  bool no_split = false;
  bool use_on_oom = false;
  std::shared_ptr<Mark> all;  // of a released pool: everything that was submitted to any stream before that
  std::deque<std::unique_ptr<Lane>> lanes;
  std::array<Lane*, 2> last{};  // used last: large, small
};

}  // namespace tem
