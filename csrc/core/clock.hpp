// Monotonic time. Deadlines are points on it, so that a wait in several steps ends when the first said it
// would.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace tem {

using Clock = std::chrono::steady_clock;  // CLOCK_MONOTONIC on Linux
using Deadline = Clock::time_point;

inline int64_t nanoseconds(Clock::time_point t) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(t.time_since_epoch()).count();
}

/// Decades stand for ever: a duration of more nanoseconds would overflow.
inline Deadline deadline_in(double seconds) {
  constexpr double kForever = 1e9;
  const double bounded = seconds > 0.0 ? std::min(seconds, kForever) : 0.0;
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded));
}

inline double seconds_until(Deadline deadline) {
  return std::chrono::duration<double>(deadline - Clock::now()).count();
}

}  // namespace tem
