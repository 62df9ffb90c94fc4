// Sizes of small blocks, and of the slabs that are cut into them. Pure.
//
// Up to 4 KiB the classes are the multiples of 512 B; above, four to every power of two, so that a block is
// never more than a quarter larger than what was asked for. A slab holds at least 8 blocks of its class: what
// one block that stays keeps from others is small beside what it was made for.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/sizes.hpp"

namespace tem {

/// Blocks of every size are rounded up to this and aligned to it, as torch's kernels assume.
constexpr size_t kAlignment = 512;
/// Blocks up to this size come from slabs.
constexpr size_t kSlabBlock = 32 * kKiB;
/// Blocks up to this size are small: they share extents with small ones alone, as in torch's allocators.
constexpr size_t kSmallBlock = kMiB;

constexpr size_t kSizeClasses = 20;
constexpr size_t kSlabBlocks = 128;  // at most, in one slab

constexpr size_t kSmallSlab = 64 * kKiB;
constexpr size_t kLargeSlab = 256 * kKiB;

/// The class of a size in 1..kSlabBlock.
constexpr size_t size_class_of(size_t bytes) {
  if (bytes <= 4 * kKiB) return (bytes + kAlignment - 1) / kAlignment - 1;
  const size_t power = floor_pow2(bytes - 1);  // power < bytes <= 2 * power
  const size_t quarter = (bytes - power + power / 4 - 1) / (power / 4);
  const auto octave = static_cast<size_t>(__builtin_ctzll(power)) - 12;
  return 7 + 4 * octave + quarter;
}

constexpr size_t class_bytes(size_t number) {
  if (number < 8) return (number + 1) * kAlignment;
  const size_t power = (4 * kKiB) << ((number - 8) / 4);
  return power + ((number - 8) % 4 + 1) * (power / 4);
}

constexpr size_t slab_bytes(size_t number) {
  return class_bytes(number) <= 4 * kKiB ? kSmallSlab : kLargeSlab;
}

static_assert(size_class_of(1) == 0 && size_class_of(512) == 0 && size_class_of(513) == 1);
static_assert(size_class_of(4096) == 7 && size_class_of(4097) == 8 && size_class_of(5120) == 8);
static_assert(size_class_of(kSlabBlock) == kSizeClasses - 1 && class_bytes(kSizeClasses - 1) == kSlabBlock);
static_assert(kSmallSlab / kAlignment <= kSlabBlocks && kLargeSlab / kSlabBlock >= 8);

}  // namespace tem
