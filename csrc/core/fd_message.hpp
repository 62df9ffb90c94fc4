// Messages with descriptors over a socket of this machine's. Nothing here blocks.
//
// Descriptors that find no room in the receiver's table are dropped, and MSG_CTRUNC says so.
#pragma once

#include <cstddef>
#include <vector>

#include "core/fd.hpp"

namespace tem {

/// With one message: the kernel takes no more.
constexpr size_t kMostFds = 253;

/// 0, or the number of the system's error.
int send_message(int socket, const void* message, size_t bytes, const std::vector<Fd>& fds);

struct Received {
  size_t bytes = 0;     // 0: the other side has gone
  int error = 0;        // the system's number; EAGAIN: nothing is there yet
  bool lost = false;    // descriptors found no room
  std::vector<Fd> fds;  // not for children
};
Received receive_message(int socket, void* message, size_t bytes);

}  // namespace tem
