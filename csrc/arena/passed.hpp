// An extent on its way to another process: the descriptor keeps its memory. Whoever drops it gives the memory
// back to the device.
#pragma once

#include <cstddef>
#include <vector>

#include "core/fd.hpp"

namespace tem {

struct Passed {
  size_t bytes = 0;
  Fd fd;
};

/// What a demander of another process takes over as it is, and how much of that goes at once.
struct Passing {
  size_t most = 0;  // extents
  std::vector<Passed> extents;
};

}  // namespace tem
