// The extents mapped in a heap. Each belongs to one lane; its stamp is the number of the lane's first mark
// that covers every free so far of a block on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "alloc/span.hpp"
#include "arena/growth.hpp"

namespace tem {

struct MappedExtent {
  Piece piece;
  Lane* lane = nullptr;
  uint64_t stamp = 0;
  bool gone = false;  // its memory: the heap is put away
};

/// Thread-safety: none; the owner brings the lock.
class ExtentMap {
 public:
  ExtentMap(size_t bytes, size_t granularity)
      : granularity_(granularity), at_granule_(bytes / granularity + 1) {}

  size_t mapped() const { return mapped_; }
  size_t count() const { return extents_.size(); }
  const std::map<size_t, MappedExtent>& all() const { return extents_; }

  /// The extent over a mapped offset.
  MappedExtent* over(size_t offset) { return at_granule_[offset / granularity_]; }

  void add(Piece piece, Lane* lane, uint64_t stamp) {
    MappedExtent& extent = extents_[piece.offset];
    extent = {piece, lane, stamp};
    for (size_t at = piece.offset; at < piece.end(); at += granularity_)
      at_granule_[at / granularity_] = &extent;
    mapped_ += piece.bytes;
  }
  void remove(size_t offset) {
    const auto found = extents_.find(offset);
    const Piece piece = found->second.piece;
    for (size_t at = piece.offset; at < piece.end(); at += granularity_)
      at_granule_[at / granularity_] = nullptr;
    mapped_ -= piece.bytes;
    extents_.erase(found);
  }

  /// Visits the extents that touch a mapped run of bytes, lowest first.
  template <class Visit>
  void touching(size_t begin, size_t end, Visit visit) {
    for (size_t at = begin; at < end;) {
      MappedExtent* extent = over(at);
      at = extent->piece.end();
      visit(*extent);
    }
  }
  template <class Visit>
  void for_each(Visit visit) {
    for (auto& entry : extents_) visit(entry.second);
  }
  /// Visits the extents that lie within a mapped run of bytes.
  template <class Visit>
  void within(size_t begin, size_t end, Visit visit) {
    touching(begin, end, [&](MappedExtent& extent) {
      if (extent.piece.offset >= begin && extent.piece.end() <= end) visit(extent);
    });
  }

 private:
  const size_t granularity_;
  SparseArray<MappedExtent> at_granule_;
  std::map<size_t, MappedExtent> extents_;
  size_t mapped_ = 0;
};

}  // namespace tem
