// The kernel's table of this process's descriptors.
//
// Fact: where threads share the table, the kernel waits for a grace period of RCU before it puts a larger one
// in its place, 7 to 30 ms. Whoever opens a descriptor, or is sent one, stands still meanwhile. It never
// shrinks.
#pragma once

#include <cstddef>

namespace tem {

/// Widens the table to so many descriptors, as far as the process's limit goes, so that nobody waits later.
void widen_descriptor_table(size_t descriptors) noexcept;

}  // namespace tem
