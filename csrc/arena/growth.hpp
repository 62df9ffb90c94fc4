// Which extents to map over a run of addresses. Pure.
//
// A driver call costs the same for 2 MiB and for 64 MiB, so growth wants few large extents; an extent comes
// free only as a whole, so shrinking wants small ones. Two rules settle it. Extents are aligned to their own
// size within the range, as buddies are, so that neighbours of any history fit together. And growth ahead of
// need is bounded by a part of what is resident already: what is mapped beyond need never exceeds that part,
// while the number of driver calls grows with the logarithm of the size until extents reach the maximum.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "core/sizes.hpp"

namespace tem {

constexpr size_t kMaxExtent = 64 * kMiB;
/// Growth may map this part of what is resident beyond what was asked for.
constexpr size_t kAheadPart = 32;

/// A run of bytes within a range.
struct Piece {
  size_t offset = 0;
  size_t bytes = 0;
  size_t end() const { return offset + bytes; }
};

/// The fewest aligned extents of at most `max_extent` that cover `run` exactly.
inline void cover(Piece run, size_t max_extent, std::vector<Piece>& out) {
  while (run.bytes != 0) {
    size_t size = std::min(max_extent, floor_pow2(run.bytes));
    if (run.offset != 0) size = std::min(size, lowest_bit(run.offset));
    out.push_back({run.offset, size});
    run.offset += size;
    run.bytes -= size;
  }
}

/// The extent size that growth of a range with `resident` bytes should not go below.
inline size_t ahead_extent(size_t resident, size_t granularity, size_t max_extent = kMaxExtent) {
  const size_t part = resident / kAheadPart;
  if (part <= granularity) return granularity;
  return std::min(max_extent, floor_pow2(part));
}

}  // namespace tem
