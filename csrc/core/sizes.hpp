// Checked arithmetic on byte counts. Overflow is bad input, never a wrap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/error.hpp"

namespace tem {

constexpr size_t kKiB = size_t{1} << 10;
constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kGiB = size_t{1} << 30;

inline size_t checked_add(size_t a, size_t b) {
  size_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) throw Error(Kind::kInvalid, "size overflows: sum exceeds 2^64");
  return sum;
}

inline size_t checked_mul(size_t a, size_t b) {
  size_t product = 0;
  if (__builtin_mul_overflow(a, b, &product))
    throw Error(Kind::kInvalid, "size overflows: product exceeds 2^64");
  return product;
}

constexpr bool is_pow2(size_t n) { return n != 0 && (n & (n - 1)) == 0; }

constexpr size_t round_down(size_t n, size_t unit) { return n / unit * unit; }

inline size_t round_up(size_t n, size_t unit) { return round_down(checked_add(n, unit - 1), unit); }

/// The largest power of two that divides `n`; `n` must not be zero.
constexpr size_t lowest_bit(size_t n) { return n & (~n + 1); }

/// The largest power of two not above `n`; `n` must not be zero.
constexpr size_t floor_pow2(size_t n) { return size_t{1} << (63 - __builtin_clzll(n)); }

/// "1.50 GiB", "2 MiB", "17 B": for messages, not for parsing.
std::string format_bytes(size_t bytes);

}  // namespace tem
