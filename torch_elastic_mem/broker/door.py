"""Who comes in at a socket: connections counted by user, and a seat for each process behind them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch_elastic_mem.broker.peers import credentials, identify, start_tick
from torch_elastic_mem.broker.session import Process
from torch_elastic_mem.errors import BrokerError

# Connections accepted in one turn.
MOST_AT_ONCE = 32
# Without descriptors nobody can be told so; somebody may end meanwhile.
PAUSE = 0.1

log = logging.getLogger(__name__)


class Connection(Protocol):
    """What comes in, as far as the door minds."""

    socket: socket.socket


C = TypeVar("C", bound=Connection)


@dataclass(slots=True, eq=False)
class Seat(Generic[C]):
    """A process that has come in. `descriptor` becomes readable when it ends."""

    process: Process
    descriptor: int
    connections: set[C] = field(default_factory=set)


class House(Protocol[C]):
    """Whose door it is. All is called on the loop's thread."""

    def most(self, uid: int) -> int:
        """How many connections a user may have, or raises BrokerError if nobody may have any more."""

    def welcome(self, connected: socket.socket, seat: Seat[C]) -> C:
        """Takes a connection in, or raises OSError or BrokerError."""

    def refuse(self, connected: socket.socket, reason: str) -> None:
        """Says why a connection is not taken in; it is closed then."""

    def bury(self, seat: Seat[C]) -> None:
        """A process has ended, though a child of it may hold its sockets open."""


class Door(Generic[C]):
    """Accepts on a listening socket, which it owns, and keeps the seats.

    Not thread-safe: it lives in one asyncio loop, which must be running.

    Args:
        listener: the socket.
        house: who is told.
        changed: called with a process and whether it comes or goes, when its seat does.
    """

    def __init__(
        self,
        listener: socket.socket,
        house: House[C],
        changed: Callable[[Process, bool], None] = lambda process, comes: None,
    ) -> None:
        self._listener = listener
        self._house = house
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._seats: dict[tuple[int, int], Seat[C]] = {}
        self._counts: dict[int, int] = {}
        # Given up to accept, and refuse, a connection when descriptors have run out.
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    @property
    def connections(self) -> int:
        """How many there are."""
        return sum(self._counts.values())

    def knows(self, pid: int, start: int) -> bool:
        """Whether a process, by its number and the tick it started at, has a seat."""
        return (pid, start) in self._seats

    def leave(self, connection: C, seat: Seat[C]) -> None:
        """Closes a connection. The seat stays until it is removed."""
        connection.socket.close()
        seat.connections.discard(connection)
        uid = seat.process.uid
        self._counts[uid] -= 1
        if not self._counts[uid]:
            del self._counts[uid]

    def remove(self, seat: Seat[C]) -> None:
        """Forgets a process, whose connections have been closed."""
        if self._seats.pop((seat.process.pid, seat.process.start), None) is not None:
            self._loop.remove_reader(seat.descriptor)
            os.close(seat.descriptor)
            self._changed(seat.process, False)

    def close(self) -> None:
        """Nobody comes in any more, and nobody's end is watched. Connections have been closed."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for seat in self._seats.values():
            self._loop.remove_reader(seat.descriptor)
            os.close(seat.descriptor)
        self._seats.clear()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _accept(self) -> None:
        for _ in range(MOST_AT_ONCE):
            try:
                connected, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                self._refuse_one()
                return
            self._admit(connected)

    def _refuse_one(self) -> None:
        """Answers with an end, as one cannot do more without descriptors, and takes a rest."""
        log.error("no more descriptors: a connection was refused; raise the limit (ulimit -n)")
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
            with contextlib.suppress(OSError):
                self._listener.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._loop.remove_reader(self._listener)
        self._loop.call_later(PAUSE, self._resume)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _admit(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        pid, uid = credentials(connected)
        try:
            seat = self._seats.get((pid, start_tick(pid)))
            if seat is not None:
                # It may have become another user's since.
                uid = seat.process.uid
            most = self._house.most(uid)
            if self._counts.get(uid, 0) >= most:
                raise BrokerError(
                    f"user {uid} has {most} connections already, as many as it may; close some, or have the "
                    f"operator allow more in a [[grant]]"
                )
            if seat is None:
                seat = self._seat(pid, uid)
            connection = self._house.welcome(connected, seat)
        except OSError as error:
            reason = (
                str(error) if isinstance(error, BrokerError) else f"process {pid} cannot be watched: {error}"
            )
            with contextlib.suppress(OSError):
                self._house.refuse(connected, reason)
            connected.close()
            return
        seat.connections.add(connection)
        self._counts[uid] = self._counts.get(uid, 0) + 1

    def _seat(self, pid: int, uid: int) -> Seat[C]:
        process, descriptor = identify(pid, uid)
        seat = self._seats[pid, process.start] = Seat(process, descriptor)
        self._loop.add_reader(descriptor, self._house.bury, seat)
        self._changed(process, True)
        return seat
