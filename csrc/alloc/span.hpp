// Spans tile a reservation: each is absent (nothing mapped), free, or taken. The span at an address is found
// through an array with an entry for every unit of addresses; only those at both ends of a span are kept
// true, so splitting and joining cost the same for any size (boundary tags, as in tcmalloc's page map). A
// slab's units all point to it, since its blocks start anywhere inside.
//
// The reservation has two regions: small blocks at the bottom in fine units, large ones above in coarse ones.
// No span crosses from one to the other. Thread-safety: none; the owner brings the lock.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <deque>
#include <memory>
#include <vector>

#include "alloc/slab.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {

class Lane;

enum class SpanState : uint8_t {
  kAbsent,  // nothing mapped
  kFree,    // in its lane's free index
  kHot,     // freed, not listed yet: expected to be used again at once
  kUsed,    // a live block
  kSlab,    // cut into blocks
  kParked   // a freed block that another stream still uses
};

struct Span {
  size_t offset = 0;
  size_t bytes = 0;
  Lane* lane = nullptr;  // null: absent
  SpanState state = SpanState::kAbsent;
  size_t requested = 0;        // of a live block
  std::vector<Stream> others;  // streams recorded on a live block
  std::unique_ptr<Slab> slab;  // of a slab
  size_t end() const { return offset + bytes; }
};

/// An array of null pointers of which only the touched pages take memory.
template <class T>
class SparseArray {
 public:
  explicit SparseArray(size_t count) : bytes_(count * sizeof(T*)) {
    void* at =
        ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
      throw Error(Kind::kOutOfMemory, "no address space for a map of " + format_bytes(bytes_));
    entries_ = static_cast<T**>(at);
  }
  SparseArray(const SparseArray&) = delete;
  SparseArray& operator=(const SparseArray&) = delete;
  ~SparseArray() { ::munmap(entries_, bytes_); }
  T*& operator[](size_t i) { return entries_[i]; }

 private:
  size_t bytes_;
  T** entries_ = nullptr;
};

class SpanMap {
 public:
  static constexpr size_t kSmallUnit = 4 * kKiB;
  static constexpr size_t kLargeUnit = 64 * kKiB;

  /// Both in bytes; multiples of the large unit. The whole is absent at first: one span a region.
  SpanMap(size_t small_bytes, size_t large_bytes)
      : small_bytes_(small_bytes),
        small_units_(small_bytes / kSmallUnit),
        entries_(small_units_ + large_bytes / kLargeUnit),
        bytes_(small_bytes + large_bytes) {
    tag(make(0, small_bytes));
    tag(make(small_bytes, large_bytes));
  }

  size_t bytes() const { return bytes_; }
  size_t region_begin(bool small) const { return small ? 0 : small_bytes_; }
  size_t region_end(bool small) const { return small ? small_bytes_ : bytes_; }
  bool is_small(size_t offset) const { return offset < small_bytes_; }
  static size_t unit(bool small) { return small ? kSmallUnit : kLargeUnit; }

  /// The span that starts at `offset`, or the slab that holds it; else null, as far as ends and slabs tell:
  /// inside other spans entries are stale, so the answer is checked against the span's own bounds.
  Span* at(size_t offset) {
    Span* span = entries_[index(offset)];
    if (span == nullptr) return nullptr;
    if (span->offset == offset) return span;
    return span->state == SpanState::kSlab && offset - span->offset < span->bytes ? span : nullptr;
  }
  Span* before(const Span* span) {
    if (span->offset == region_begin(is_small(span->offset))) return nullptr;
    return entries_[index(span->offset - 1)];
  }
  Span* after(const Span* span) {
    if (span->end() == region_end(is_small(span->offset))) return nullptr;
    return entries_[index(span->end())];
  }

  /// Cuts a span; the rest is a span of the same state and lane. Null if there is no rest.
  Span* split(Span* span, size_t bytes) {
    if (span->bytes == bytes) return nullptr;
    Span* rest = make(span->offset + bytes, span->bytes - bytes);
    rest->lane = span->lane;
    rest->state = span->state;
    span->bytes = bytes;
    tag(span);
    tag(rest);
    return rest;
  }
  /// Joins two neighbours into the first; the second is gone.
  void join(Span* left, Span* right) {
    left->bytes += right->bytes;
    right->bytes = 0;
    spare_.push_back(right);
    tag(left);
  }
  /// Points all units of a slab to it.
  void tag_inside(Span* span) {
    for (size_t at = span->offset; at < span->end(); at += kSmallUnit) entries_[index(at)] = span;
  }

 private:
  size_t index(size_t offset) const {
    return offset < small_bytes_ ? offset / kSmallUnit : small_units_ + (offset - small_bytes_) / kLargeUnit;
  }
  void tag(Span* span) {
    entries_[index(span->offset)] = span;
    entries_[index(span->end() - 1)] = span;
  }
  Span* make(size_t offset, size_t bytes) {
    Span* span = nullptr;
    if (spare_.empty()) {
      span = &all_.emplace_back();
      spare_.reserve(all_.size());  // so that join() cannot fail
    } else {
      span = spare_.back();
      spare_.pop_back();
    }
    span->offset = offset;
    span->bytes = bytes;
    span->requested = 0;
    return span;
  }

  const size_t small_bytes_;
  const size_t small_units_;
  SparseArray<Span> entries_;
  const size_t bytes_;
  std::deque<Span> all_;  // never freed: a stale entry may point to any of them
  std::vector<Span*> spare_;
};

}  // namespace tem
