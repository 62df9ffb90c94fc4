// A child of fork() has none of its parent's threads, and CUDA does not work in it at all. What was made
// before the fork is therefore dead in the child: calls raise, destructors do nothing.
#pragma once

#include <cstdint>

namespace tem {

/// Counts the forks that led to this process since the library was loaded. Costs one relaxed load.
uint64_t fork_generation() noexcept;

/// Has children of fork() close a descriptor at once. False if it cannot be noted: its number is too high.
bool close_in_children(int descriptor) noexcept;
/// Takes that back.
void leave_to_children(int descriptor) noexcept;

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
