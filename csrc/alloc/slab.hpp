// A span cut into blocks of one size class. Bitmaps say which are free and which are live; what is neither is
// parked: freed, while another stream still uses it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "alloc/size_class.hpp"
#include "backend/backend.hpp"

namespace tem {

struct Span;

class Slab {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  Slab(Span* span, size_t number)
      : span_(span),
        number_(static_cast<uint32_t>(number)),
        bytes_(static_cast<uint32_t>(class_bytes(number))),
        capacity_(static_cast<uint32_t>(slab_bytes(number) / class_bytes(number))),
        reciprocal_(((uint64_t{1} << 32) + bytes_ - 1) / bytes_) {
    for (uint32_t i = 0; i < capacity_; ++i) free_[i / 64] |= bit(i);
  }

  Span* span() const { return span_; }
  size_t number() const { return number_; }
  size_t block_bytes() const { return bytes_; }
  uint32_t capacity() const { return capacity_; }
  bool full() const { return (free_[0] | free_[1]) == 0; }
  bool empty() const { return taken_ == 0; }
  /// Whether none is live: what is not free is parked.
  bool deserted() const { return (live_[0] | live_[1]) == 0; }
  bool live(uint32_t block) const { return (live_[block / 64] & bit(block)) != 0; }
  bool available(uint32_t block) const { return (free_[block / 64] & bit(block)) != 0; }
  uint32_t requested(uint32_t block) const { return requested_[block]; }

  /// The block that starts `delta` bytes into the slab; kNone if none does.
  uint32_t at(size_t delta) const {
    const uint32_t block = holding(delta);
    return block < capacity_ && size_t{block} * bytes_ == delta ? block : kNone;
  }
  /// The block that holds the byte; may be capacity() or more in what is left at the end. Exact: a slab has
  /// fewer than 2^18 bytes, and the reciprocal is off by less than 2^-32.
  uint32_t holding(size_t delta) const { return static_cast<uint32_t>((delta * reciprocal_) >> 32); }

  /// The lowest free block becomes live; the slab must not be full.
  uint32_t take(size_t requested) {
    const size_t word = free_[0] != 0 ? 0 : 1;
    const auto block = static_cast<uint32_t>(word * 64 + static_cast<size_t>(__builtin_ctzll(free_[word])));
    claim(block, requested);
    return block;
  }
  void claim(uint32_t block, size_t requested) {
    free_[block / 64] &= ~bit(block);
    live_[block / 64] |= bit(block);
    requested_[block] = static_cast<uint32_t>(requested);
    ++taken_;
  }
  void park(uint32_t block) { live_[block / 64] &= ~bit(block); }
  void put(uint32_t block) {
    live_[block / 64] &= ~bit(block);
    free_[block / 64] |= bit(block);
    --taken_;
  }

  /// Streams recorded on a live block: few blocks have any.
  std::vector<Stream>& others(uint32_t block) {
    for (auto& [owner, streams] : others_) {
      if (owner == block) return streams;
    }
    return others_.emplace_back(block, std::vector<Stream>()).second;
  }
  std::vector<Stream> take_others(uint32_t block) {
    for (auto& entry : others_) {
      if (entry.first != block) continue;
      std::vector<Stream> streams = std::move(entry.second);
      entry = std::move(others_.back());
      others_.pop_back();
      return streams;
    }
    return {};
  }
  bool shared() const { return !others_.empty(); }

  bool kept = false;       // empty, and not given up yet
  bool came_back = false;  // the first block since then is the only one
  bool stamped = false;    // nothing has been taken since the last live block went, and that is stamped

  // Neighbours in the list of slabs with room of one lane and class.
  Slab* previous = nullptr;
  Slab* next = nullptr;

 private:
  static constexpr uint64_t bit(uint32_t block) { return uint64_t{1} << (block % 64); }

  Span* span_;
  uint32_t number_;
  uint32_t bytes_;
  uint32_t capacity_;
  uint32_t taken_ = 0;  // live or parked
  uint64_t reciprocal_;
  std::array<uint64_t, kSlabBlocks / 64> free_{};
  std::array<uint64_t, kSlabBlocks / 64> live_{};
  std::array<uint32_t, kSlabBlocks> requested_{};
  std::vector<std::pair<uint32_t, std::vector<Stream>>> others_;
};

}  // namespace tem
