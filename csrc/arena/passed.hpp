// Memory that another process has passed on: the descriptor keeps it. Whoever drops it gives it back to the
// device.
#pragma once

#include <cstddef>

#include "core/fd.hpp"

namespace tem {

struct Passed {
  size_t bytes = 0;
  Fd fd;
};

}  // namespace tem
