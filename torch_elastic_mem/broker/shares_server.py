"""The shares socket: processes that share memory, and those that have it mapped.

Facts:
    - Descriptors that find no room in the receiver's table are dropped, and MSG_CTRUNC says so.
    - The socket of a process that has ended may be open in a child; its pidfd tells.

Whatever a connection does hurts that connection only.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from torch_elastic_mem.broker.broker import Broker
from torch_elastic_mem.broker.daemon import Running, listen
from torch_elastic_mem.broker.peers import credentials, identify, start_tick
from torch_elastic_mem.broker.session import Process
from torch_elastic_mem.broker.share_keeper import Membership, Publishing, ShareKeeper, close_all
from torch_elastic_mem.broker.share_messages import (
    BATCH,
    MAX_MESSAGE,
    Answer,
    Attach,
    Extents,
    Fetch,
    Leave,
    Publish,
    decode_request,
    encode,
    refusal,
)
from torch_elastic_mem.errors import BrokerError, InvalidArgument, TemError

# Connections accepted before others have their turn, and the rest that is taken without descriptors.
TURN = 32
PAUSE = 0.1
_MOST_FDS = 253

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Seat:
    """A process that is connected, or a member. `descriptor` becomes readable when it ends."""

    process: Process
    descriptor: int
    connections: set[Connection] = field(default_factory=set)
    memberships: set[Membership] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Connection:
    """One connection of a process: nothing yet, or a publisher that is sending, or a member."""

    socket: socket.socket
    seat: Seat
    publishing: Publishing | None = None
    joined: Membership | None = None


class SharesServer:
    """Takes the descriptors of shares in, and hands them to members.

    Not thread-safe: it lives in one asyncio loop, which must be running.
    """

    def __init__(self, broker: Broker, listener: socket.socket, moved: Callable[[], None]) -> None:
        self._broker = broker
        self._listener = listener
        self._moved = moved
        self._loop = asyncio.get_running_loop()
        self._seats: dict[tuple[int, int], Seat] = {}
        self._counts: dict[int, int] = {}
        self._keeper = ShareKeeper(broker)
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Stops, and closes every descriptor. Members keep what they have mapped."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for seat in list(self._seats.values()):
            for connection in list(seat.connections):
                self._detach(connection)
            self._loop.remove_reader(seat.descriptor)
            os.close(seat.descriptor)
        self._seats.clear()
        self._keeper.close()

    # Coming.

    def _accept(self) -> None:
        for _ in range(TURN):
            try:
                connected, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                # They wait in line, and asking at once again would burn a core.
                log.error("no more descriptors: connections wait; raise the limit (ulimit -n)")
                self._loop.remove_reader(self._listener)
                self._loop.call_later(PAUSE, self._resume)
                return
            self._welcome(connected)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _welcome(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        pid, uid = credentials(connected)
        try:
            most = self._broker.connections_of(uid)
            if self._counts.get(uid, 0) >= most:
                raise BrokerError(
                    f"user {uid} has {most} connections already, as many as it may; close some, or have the "
                    f"operator allow more in a [[grant]]"
                )
            if sum(self._counts.values()) >= self._keeper.room:
                raise BrokerError("too many processes are connected; have its limit raised (ulimit -n)")
            seat = self._seat(pid, uid)
        except (BrokerError, OSError) as error:
            with contextlib.suppress(OSError):
                connected.send(
                    encode(refusal(BrokerError(f"the broker does not serve process {pid} here: {error}")))
                )
            connected.close()
            return
        connection = Connection(connected, seat)
        seat.connections.add(connection)
        self._counts[uid] = self._counts.get(uid, 0) + 1
        self._loop.add_reader(connected, self._read, connection)

    def _seat(self, pid: int, uid: int) -> Seat:
        seat = self._seats.get((pid, start_tick(pid)))
        if seat is None:
            process, descriptor = identify(pid, uid)
            seat = self._seats[pid, process.start] = Seat(process, descriptor)
            self._loop.add_reader(descriptor, self._bury, seat)
        return seat

    # Speaking.

    def _read(self, connection: Connection) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(
                connection.socket, MAX_MESSAGE + 1, _MOST_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)
            return
        try:
            if not data:
                self._drop(connection)
                return
            if flags & socket.MSG_CTRUNC:
                raise BrokerError("the broker may open no more files; have its limit raised (ulimit -n)")
            answer, given = self._do(connection, _request(data, flags), fds)
        except TemError as error:
            # Whoever is refused says nothing more on this connection.
            self._send(connection, refusal(error), [])
            self._drop(connection)
            return
        finally:
            close_all(fds)
        if answer is not None:
            self._send(connection, answer, given)

    def _do(self, connection: Connection, request: object, fds: list[int]) -> tuple[Answer | None, list[int]]:
        """Does what is asked, and takes out of `fds` what it keeps.

        Returns:
            The answer, and descriptors that go with it.
        """
        keeper, seat = self._keeper, connection.seat
        match request:
            case Publish() if len(fds) == 1 and _is_fresh(connection):
                connection.publishing = keeper.begin(seat.process, request, fds)
                return Answer(), []
            case Extents() if connection.publishing is not None and fds:
                kept = connection.publishing.kept
                joined = keeper.take(connection.publishing, seat.process, fds)
                if joined is not None:
                    connection.publishing = None
                    self._join(connection, joined)
                return Answer(extents=len(kept.extents)), []
            case Attach() if not fds and _is_fresh(connection):
                joined = keeper.attach(seat.process, request)
                self._join(connection, joined)
                kept = keeper.kept(joined)
                return Answer(bytes=joined.share.bytes, extents=len(kept.extents)), [kept.header]
            case Fetch() if not fds and connection.joined is not None:
                extents = keeper.kept(connection.joined).extents
                if not 0 <= request.first < len(extents):
                    raise InvalidArgument(f"there is no extent {request.first}, but {len(extents)} of them")
                part = extents[request.first : request.first + BATCH]
                return Answer(given=len(part)), part
            case Leave() if not fds and connection.joined is not None:
                self._detach(connection)
                self._leave(seat, [connection.joined])
                return None, []
            case _:
                raise InvalidArgument(
                    f"{type(request).__name__.upper()} with {len(fds)} descriptors is not to be said here"
                )

    @staticmethod
    def _join(connection: Connection, joined: Membership) -> None:
        connection.joined = joined
        connection.seat.memberships.add(joined)

    def _send(self, connection: Connection, answer: Answer, fds: list[int]) -> None:
        if connection.socket.fileno() < 0:
            return
        try:
            # What waits to be read holds descriptors that count against the broker.
            unread = struct.unpack("i", fcntl.ioctl(connection.socket, termios.TIOCOUTQ, b"\0" * 4))[0]
            if unread:
                self._drop(connection)
            elif fds:
                socket.send_fds(connection.socket, [encode(answer)], fds)
            else:
                connection.socket.send(encode(answer))
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS and fds:
                self._send(connection, Answer(later=True), [])
            else:
                self._drop(connection)

    # Going.

    def _detach(self, connection: Connection) -> None:
        if connection.socket.fileno() < 0:
            return
        self._loop.remove_reader(connection.socket)
        connection.socket.close()
        connection.seat.connections.discard(connection)
        uid = connection.seat.process.uid
        self._counts[uid] -= 1
        if not self._counts[uid]:
            del self._counts[uid]
        if connection.publishing is not None:
            self._keeper.give_up(connection.publishing)
            connection.publishing = None

    def _drop(self, connection: Connection) -> None:
        """A connection has ended. A member that has not left stays one while its process lives."""
        self._detach(connection)
        self._settle(connection.seat)

    def _bury(self, seat: Seat) -> None:
        """A process has ended, though a child of it may hold its sockets open."""
        for connection in list(seat.connections):
            self._detach(connection)
        self._leave(seat, list(seat.memberships))

    def _leave(self, seat: Seat, memberships: Iterable[Membership]) -> None:
        seat.memberships.difference_update(memberships)
        self._settle(seat)
        self._keeper.leave(memberships)
        self._moved()

    def _settle(self, seat: Seat) -> None:
        """Forgets a process that has no connection and is no member."""
        if seat.connections or seat.memberships:
            return
        if self._seats.pop((seat.process.pid, seat.process.start), None) is not None:
            self._loop.remove_reader(seat.descriptor)
            os.close(seat.descriptor)


@contextlib.asynccontextmanager
async def serve_shares(running: Running) -> AsyncIterator[SharesServer]:
    """Serves beside the tenants' socket, for `daemon.run`.

    Raises:
        OSError: the socket cannot be opened.
    """
    path = running.paths.shares
    given = running.sockets.pop("shares", None)
    server = SharesServer(running.broker, given or listen(path, running.config), running.server.flush)
    try:
        yield server
    finally:
        server.close()
        # What systemd has opened it gives to the next broker.
        if given is None:
            path.unlink(missing_ok=True)


def _is_fresh(connection: Connection) -> bool:
    return connection.publishing is None and connection.joined is None


def _request(data: bytes, flags: int) -> object:
    if flags & socket.MSG_TRUNC or len(data) > MAX_MESSAGE:
        raise InvalidArgument(f"a message is at most {MAX_MESSAGE} bytes")
    try:
        return decode_request(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"not a message: {error}") from None
