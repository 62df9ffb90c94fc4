// A child of fork() has none of its parent's threads, and CUDA does not work in it at all. What was made
// before the fork is therefore dead in the child: calls raise, destructors do nothing.
//
// It inherits descriptors, and one of memory would keep that memory from the device for as long as the child
// lives. So those are noted, and every child closes what is noted at its birth. A descriptor is open before
// its number is known, and its number may be another's once it is closed: fork() waits while either goes on.
#pragma once

#include <cstdint>
#include <mutex>

namespace tem {

/// Counts the forks that led to this process since the library was loaded. Costs one relaxed load.
uint64_t fork_generation() noexcept;

/// Held from before a descriptor is opened until it is noted, and while a noted one is closed: fork() waits
/// for its end. A leaf lock, for one call of the system or the driver.
class NoFork {
 public:
  NoFork();
  /// Has children of fork() close a descriptor.
  void note(int descriptor) const;
  /// Takes that back.
  void forget(int descriptor) const noexcept;

 private:
  std::lock_guard<std::mutex> lock_;
};

/// Remembers the process an object was made in.
class BornHere {
 public:
  BornHere() noexcept : generation_(fork_generation()) {}
  bool here() const noexcept { return generation_ == fork_generation(); }
  /// Error{kForked} in a child of the process that made `what`.
  void check(const char* what) const;

 private:
  uint64_t generation_;
};

}  // namespace tem
