"""What systemd gives a service and wants to hear of it: sd_listen_fds(3) and sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

_FIRST = 3


def inherited(environment: Mapping[str, str]) -> dict[str, socket.socket]:
    """The sockets that systemd has opened for this process, by name."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(environment.get("LISTEN_FDS", "0"))
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    sockets = {}
    for position in range(count):
        name = names[position] if position < len(names) else ""
        found = socket.socket(fileno=_FIRST + position)
        found.set_inheritable(False)
        sockets[name.removesuffix(".socket")] = found
    return sockets


def notify(environment: Mapping[str, str], *states: str) -> None:
    """Tells systemd, where it listens: "READY=1", "STOPPING=1", "WATCHDOG=1"."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    # A broker whose manager does not listen serves its tenants all the same.
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as told:
        told.sendto("\n".join(states).encode(), address.replace("@", "\0", 1))


def watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """How often it wants to hear that the service lives: half of the time after which it is restarted."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = environment.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdigit() and int(microseconds) > 0 else None
