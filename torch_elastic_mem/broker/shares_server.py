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
import socket
import struct
import termios
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import msgspec

from torch_elastic_mem.broker.broker import Broker
from torch_elastic_mem.broker.daemon import Running, listen
from torch_elastic_mem.broker.door import Door, Seat
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

_MOST_FDS = 253


@dataclass(slots=True, eq=False)
class Connection:
    """One connection of a process: nothing yet, or a publisher that is sending, or a member."""

    socket: socket.socket
    seat: Seat[Connection]
    publishing: Publishing | None = None
    joined: Membership | None = None


class SharesServer:
    """Takes the descriptors of shares in, and hands them to members.

    Not thread-safe: it lives in one asyncio loop, which must be running.

    Args:
        broker: whose books charge for what is shared; touched within `turn`.
        listener: the socket.
        turn: of the broker.
    """

    def __init__(
        self, broker: Broker, listener: socket.socket, turn: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._broker = broker
        self._turn = turn
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._memberships: defaultdict[Process, set[Membership]] = defaultdict(set)
        self._keeper = ShareKeeper(broker)
        self._door: Door[Connection] = Door(listener, self)

    def close(self) -> None:
        """Stops, and closes every descriptor. Members keep what they have mapped."""
        for connection in list(self._connections):
            self._detach(connection)
        self._door.close()
        self._keeper.close()

    # Coming.

    def most(self, uid: int) -> int:
        """How many connections a user may have."""
        if self._door.connections >= self._keeper.room:
            raise BrokerError("too many processes are connected; have its limit raised (ulimit -n)")
        return self._broker.connections_of(uid)

    def welcome(self, connected: socket.socket, seat: Seat[Connection]) -> Connection:
        """Takes a connection in."""
        connection = Connection(connected, seat)
        self._connections.add(connection)
        self._loop.add_reader(connected, self._read, connection)
        return connection

    def refuse(self, connected: socket.socket, reason: str) -> None:
        """Says why a connection is not taken in."""
        connected.send(encode(refusal(BrokerError(f"the broker does not serve this process: {reason}"))))

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
            request = _request(data, flags)
            with self._turn():
                answer, given = self._do(connection, request, fds)
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

    def _join(self, connection: Connection, joined: Membership) -> None:
        connection.joined = joined
        self._memberships[connection.seat.process].add(joined)

    def _send(self, connection: Connection, answer: Answer, fds: list[int]) -> None:
        if connection not in self._connections:
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

    def bury(self, seat: Seat[Connection]) -> None:
        """A process has ended, though a child of it may hold its sockets open."""
        for connection in list(seat.connections):
            self._detach(connection)
        self._leave(seat, list(self._memberships[seat.process]))

    def _detach(self, connection: Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        self._loop.remove_reader(connection.socket)
        self._door.leave(connection, connection.seat)
        if connection.publishing is not None:
            self._keeper.give_up(connection.publishing)
            connection.publishing = None

    def _drop(self, connection: Connection) -> None:
        """A connection has ended. A member that has not left stays one while its process lives."""
        self._detach(connection)
        self._settle(connection.seat)

    def _leave(self, seat: Seat[Connection], memberships: list[Membership]) -> None:
        self._memberships[seat.process].difference_update(memberships)
        self._settle(seat)
        with self._turn():
            self._keeper.leave(memberships)

    def _settle(self, seat: Seat[Connection]) -> None:
        """Forgets a process that has no connection and is no member."""
        if not seat.connections and not self._memberships[seat.process]:
            del self._memberships[seat.process]
            self._door.remove(seat)


@contextlib.asynccontextmanager
async def serve_shares(running: Running) -> AsyncIterator[SharesServer]:
    """Serves beside the tenants' socket, for `daemon.run`.

    Raises:
        OSError: the socket cannot be opened.
    """
    path = running.paths.shares
    given = running.sockets.pop("shares", None)
    server = SharesServer(running.broker, given or listen(path, running.config), running.server.turn)
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
