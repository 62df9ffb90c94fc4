"""Processes as the kernel shows them: who is at the other end of a socket, and whether it still lives."""

from __future__ import annotations

import os
import select
import socket
import struct

from torch_elastic_mem.broker.session import Process

_CREDENTIALS = struct.Struct("iII")


def credentials(connection: socket.socket) -> tuple[int, int]:
    """The pid and user of the process that connected."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    return pid, uid


def start_tick(pid: int) -> int:
    """The clock tick since boot at which a process started.

    Raises:
        ProcessLookupError: there is none of that number, or none to be seen from here.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name may have blanks and brackets in it.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, IndexError):
        raise ProcessLookupError(f"there is no process {pid}") from None


def identify(pid: int, uid: int) -> tuple[Process, int]:
    """A living process, and a descriptor that becomes readable when it ends.

    Raises:
        ProcessLookupError: it has ended, or cannot be seen from here.
        OSError: there are no more descriptors.
    """
    if pid <= 0:
        raise ProcessLookupError("the process is in a container that cannot be seen from here")
    descriptor = os.pidfd_open(pid)
    try:
        process = Process(pid, uid, start_tick(pid))
        if select.select([descriptor], [], [], 0)[0]:
            raise ProcessLookupError(f"process {pid} has ended")
    except BaseException:
        os.close(descriptor)
        raise
    return process, descriptor
