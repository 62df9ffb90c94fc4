// Which devices may reach the memory of which. torch asks once a pair and process, so that what comes to
// serve a device later is told here.
#pragma once

#include "alloc/heap.hpp"

namespace tem {

/// From now on `peer` may reach what accounts have on `device`.
void remember_peer(int device, int peer);

/// Opens a CUDA heap's device to the peers that it should have. Costs one load while there are none.
void tell_peers(Heap& heap);

}  // namespace tem
