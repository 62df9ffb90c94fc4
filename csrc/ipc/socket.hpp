// Messages and descriptors over a socket of this machine's. Nothing here blocks.
//
// Facts:
//  - A name that starts with a null byte is in no file system: it goes with its socket, and a process of
//    another network namespace does not see it.
//  - SOCK_SEQPACKET keeps messages whole, and tells when the other side has gone.
//  - The kernel knows who is on the other side as it was when it connected or listened (SO_PEERCRED).
//  - Descriptors that find no room in the receiver's table are dropped, and MSG_CTRUNC says so.
#pragma once

#include <sys/types.h>

#include <array>
#include <optional>
#include <vector>

#include "core/clock.hpp"
#include "core/fd.hpp"

namespace tem::ipc {

using SocketName = std::array<unsigned char, 16>;

/// Random bytes from the kernel.
std::array<unsigned char, 16> random_bytes();

Fd listen_at(const SocketName& name);
/// Nothing if nobody waits to connect.
Fd accept_from(const Fd& listening);
/// Nothing if nobody listens there. Error{kDriver} at the deadline.
Fd connect_to(const SocketName& name, Deadline deadline);
/// The user on the other side; nothing if the kernel does not say.
std::optional<uid_t> peer_of(const Fd& socket);

/// Whether something can be received, or the other side has gone. False at the deadline.
bool wait_readable(const Fd& socket, Deadline deadline);
/// 0, or the number of the system's error.
int send_message(const Fd& socket, const void* message, size_t bytes, const std::vector<Fd>& fds);

struct Received {
  size_t bytes = 0;   // 0: the other side has gone
  int error = 0;      // the system's number; EAGAIN: nothing is there yet
  bool lost = false;  // descriptors found no room
  std::vector<Fd> fds;
};
Received receive_message(const Fd& socket, void* message, size_t bytes);

}  // namespace tem::ipc
