// Spare extents: created, mapped nowhere. A growth from here saves the driver's create, and a yield within a
// process passes through here. Guarded by the arena's lock.
#pragma once

#include <cstddef>
#include <iterator>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "arena/handles.hpp"

namespace tem {

class ExtentPool {
 public:
  size_t bytes() const { return bytes_; }

  /// The spare of exactly this size that came last.
  std::optional<Extent> take(size_t bytes) {
    const auto found = by_size_.find(bytes);
    if (found == by_size_.end()) return std::nullopt;
    Extent extent = std::move(found->second.back());
    found->second.pop_back();
    if (found->second.empty()) by_size_.erase(found);
    bytes_ -= bytes;
    return extent;
  }

  void put(Extent extent) {
    const size_t bytes = extent.bytes();
    by_size_[bytes].push_back(std::move(extent));
    bytes_ += bytes;
  }

  /// The largest spare of at most so many bytes.
  std::optional<Extent> take_largest(size_t most) {
    const auto above = by_size_.upper_bound(most);
    return above == by_size_.begin() ? std::nullopt : take(std::prev(above)->first);
  }

  /// Releases spares, smallest first, until at most `keep` bytes are left: small extents are the ones that
  /// cost a growth the most calls. A driver that refuses leaves the extent here and throws.
  void shrink_to(size_t keep) {
    while (bytes_ > keep) {
      auto& smallest = by_size_.begin()->second;
      const size_t bytes = smallest.back().bytes();
      smallest.back().release();
      smallest.pop_back();
      if (smallest.empty()) by_size_.erase(by_size_.begin());
      bytes_ -= bytes;
    }
  }

 private:
  std::map<size_t, std::vector<Extent>> by_size_;
  size_t bytes_ = 0;
};

}  // namespace tem
