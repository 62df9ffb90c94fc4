#include "core/sizes.hpp"

#include <array>
#include <cstdio>

namespace tem {

std::string format_bytes(size_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  double value = static_cast<double>(bytes);
  while (value >= 1024.0 && unit + 1 < kUnits.size()) {
    value /= 1024.0;
    ++unit;
  }
  std::array<char, 40> text{};
  const bool whole = value == static_cast<double>(static_cast<size_t>(value));
  std::snprintf(text.data(), text.size(), whole ? "%.0f %s" : "%.2f %s", value, kUnits[unit]);
  return text.data();
}

}  // namespace tem
