// Sockets of this machine's, and who is on the other side. Nothing here blocks.
//
// Facts:
//  - A name that starts with a null byte is in no file system: it goes with its socket, and a process of
//    another network namespace does not see it.
//  - SOCK_SEQPACKET keeps messages whole, and tells when the other side has gone.
//  - The kernel knows who is on the other side as it was when it connected or listened (SO_PEERCRED).
#pragma once

#include <sys/types.h>

#include <array>
#include <optional>

#include "core/clock.hpp"
#include "core/fd.hpp"
#include "core/fd_message.hpp"

namespace tem::ipc {

using SocketName = std::array<unsigned char, 16>;

/// Random bytes from the kernel.
std::array<unsigned char, 16> random_bytes();

/// Neither this nor what it accepts is for children: a name is free, and a peer told, when the process has
/// ended.
Fd listen_at(const SocketName& name, const NoFork& no_fork);
/// Nothing if nobody waits to connect.
Fd accept_from(const Fd& listening);
/// Nothing if nobody listens there. Error{kDriver} at the deadline.
Fd connect_to(const SocketName& name, Deadline deadline);
/// The user on the other side; nothing if the kernel does not say.
std::optional<uid_t> peer_of(const Fd& socket);

/// Whether something can be received, or the other side has gone. False at the deadline.
bool wait_readable(const Fd& socket, Deadline deadline);

}  // namespace tem::ipc
