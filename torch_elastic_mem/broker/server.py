"""The tenants' socket: connections, and the processes behind them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import socket
from collections import deque
from dataclasses import dataclass, field

from torch_elastic_mem.broker.broker import Broker
from torch_elastic_mem.broker.peers import credentials, identify, start_tick
from torch_elastic_mem.broker.protocol import (
    MAX_MESSAGE,
    NOT_PERMITTED,
    WRONG_VERSION,
    Bye,
    Hello,
    Message,
    ProtocolError,
    Refused,
    decode,
    encode,
)
from torch_elastic_mem.broker.roster import Roster
from torch_elastic_mem.broker.rules import kind_of
from torch_elastic_mem.broker.session import Process, Session
from torch_elastic_mem.errors import TemError

# Messages that wait for a process to read. One that is so far behind has stopped listening.
MOST_UNREAD = 1024
# Connections accepted in one turn.
MOST_AT_ONCE = 32
# Messages taken from one connection before others have their turn.
# A RETURN and the DEMAND behind it.
TURN = 2
# Without descriptors nobody can be told so; somebody may end meanwhile.
PAUSE = 0.1

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Seat:
    """A process that has connected. `descriptor` becomes readable when it ends."""

    process: Process
    descriptor: int
    connections: set[Connection] = field(default_factory=set)


class Connection:
    """One connection of a process."""

    __slots__ = ("seat", "session", "socket", "unread")

    def __init__(self, connected: socket.socket, seat: Seat) -> None:
        self.socket = connected
        self.seat = seat
        self.session: Session | None = None
        self.unread: deque[bytes] = deque()


class Server:
    """Takes tenants' messages to a broker and brings them its own.

    Not thread-safe: it lives in one asyncio loop, which must be running.
    """

    def __init__(self, broker: Broker, listener: socket.socket, roster: Roster) -> None:
        self._broker = broker
        self._listener = listener
        self._roster = roster
        self._loop = asyncio.get_running_loop()
        self._seats: dict[tuple[int, int], Seat] = {}
        self._by_session: dict[Session, Connection] = {}
        self._counts: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wake = math.inf
        # Given up to accept, and refuse, a connection when descriptors have run out.
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    @property
    def connections(self) -> int:
        """How many there are."""
        return sum(len(seat.connections) for seat in self._seats.values())

    def knows(self, pid: int, start: int) -> bool:
        """Whether a process, by its number and the tick it started at, has connected."""
        return (pid, start) in self._seats

    def close(self) -> None:
        """Stops. Connections end, and tenants keep what they hold."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        if self._timer is not None:
            self._timer.cancel()
        for seat in list(self._seats.values()):
            for connection in list(seat.connections):
                self._detach(connection)
            self._loop.remove_reader(seat.descriptor)
            os.close(seat.descriptor)
        self._seats.clear()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    # Coming.

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
            self._welcome(connected)

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

    def _welcome(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        pid, uid = credentials(connected)
        most = self._broker.connections_of(uid)
        if self._counts.get(uid, 0) >= most:
            words = (
                f"user {uid} has {most} connections already, as many as it may; close some, or have the "
                f"operator allow more in a [[grant]]"
            )
            self._refuse(connected, NOT_PERMITTED, words)
            return
        try:
            seat = self._seat(pid, uid)
        except OSError as error:
            self._refuse(connected, NOT_PERMITTED, f"process {pid} cannot be watched: {error}")
            return
        connection = Connection(connected, seat)
        seat.connections.add(connection)
        self._counts[uid] = self._counts.get(uid, 0) + 1
        self._loop.add_reader(connected, self._read, connection)

    def _seat(self, pid: int, uid: int) -> Seat:
        seat = self._seats.get((pid, start_tick(pid)))
        if seat is not None:
            return seat
        process, descriptor = identify(pid, uid)
        seat = self._seats[pid, process.start] = Seat(process, descriptor)
        self._loop.add_reader(descriptor, self._bury, seat)
        self._roster.add(process)
        return seat

    @staticmethod
    def _refuse(connected: socket.socket, kind: int, reason: str, request: int = 0) -> None:
        with contextlib.suppress(OSError):
            connected.send(encode(request, Refused(kind, reason)))
        connected.close()

    # Speaking.

    def _read(self, connection: Connection) -> None:
        receive = connection.socket.recv
        for _ in range(TURN):
            try:
                data = receive(MAX_MESSAGE + 1)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self._drop(connection, None)
                break
            try:
                request, message = decode(data)
                if not self._handle(connection, request, message):
                    break
            except ProtocolError as error:
                if error.wrong_version and connection.session is None:
                    refused = encode(_request_of(data), Refused(WRONG_VERSION, str(error)))
                    with contextlib.suppress(OSError):
                        connection.socket.send(refused)
                self._drop(connection, str(error))
                break
            if self._broker.post:
                self._send()
            if connection.socket.fileno() < 0:
                break
        self.flush()

    def _handle(self, connection: Connection, request: int, message: Message) -> bool:
        session = connection.session
        if session is not None:
            if isinstance(message, Bye):
                self._detach(connection)
                self._broker.leave(session)
                self._settle_seat(connection.seat)
                return False
            self._broker.receive(session, request, message)
            return True
        if not isinstance(message, Hello):
            raise ProtocolError("a connection begins with HELLO")
        try:
            session = self._broker.hello(connection.seat.process, request, message)
        except TemError as error:
            self._post(connection, encode(request, Refused(kind_of(error), str(error))))
            return True
        connection.session = session
        self._by_session[session] = connection
        return True

    def flush(self) -> None:
        """Sends what the broker has to say, and sets the clock for when it next has to do something."""
        self._send()
        wake = self._broker.wake()
        if wake == self._wake:
            return
        self._wake = wake
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake != math.inf:
            # The loop rounds down to its clock's resolution, and would come too early.
            self._timer = self._loop.call_at(min(wake, self._loop.time() + 3600) + 1e-4, self._tick)

    def _tick(self) -> None:
        self._timer, self._wake = None, math.inf
        self._broker.tick()
        self.flush()

    def _send(self) -> None:
        while post := self._broker.post:
            letters = list(post)
            post.clear()
            for session, request, message in letters:
                connection = self._by_session.get(session)
                if connection is not None:
                    self._post(connection, encode(request, message))

    def _post(self, connection: Connection, data: bytes) -> None:
        if connection.unread:
            connection.unread.append(data)
            if len(connection.unread) > MOST_UNREAD:
                self._drop(connection, f"it has not read {MOST_UNREAD} messages")
            return
        try:
            connection.socket.send(data)
        except (BlockingIOError, InterruptedError):
            connection.unread.append(data)
            self._loop.add_writer(connection.socket, self._write, connection)
        except OSError as error:
            # ENOBUFS passes; every other error is the end of the connection.
            if error.errno == errno.ENOBUFS:
                connection.unread.append(data)
                self._loop.add_writer(connection.socket, self._write, connection)
            else:
                self._drop(connection, None)

    def _write(self, connection: Connection) -> None:
        while connection.unread:
            try:
                connection.socket.send(connection.unread[0])
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._drop(connection, None)
                self.flush()
                return
            connection.unread.popleft()
        self._loop.remove_writer(connection.socket)

    # Going.

    def _detach(self, connection: Connection) -> None:
        """Ends a connection's socket."""
        if connection.socket.fileno() < 0:
            return
        self._loop.remove_reader(connection.socket)
        self._loop.remove_writer(connection.socket)
        connection.socket.close()
        connection.seat.connections.discard(connection)
        uid = connection.seat.process.uid
        self._counts[uid] -= 1
        if not self._counts[uid]:
            del self._counts[uid]
        if connection.session is not None:
            self._by_session.pop(connection.session, None)

    def _drop(self, connection: Connection, reason: str | None) -> None:
        """A connection has ended without BYE, or is ended for a reason."""
        if connection.socket.fileno() < 0:
            return
        process = connection.seat.process
        if reason is not None:
            log.warning("closed a connection of process %d (user %d): %s", process.pid, process.uid, reason)
        self._detach(connection)
        if connection.session is not None:
            self._broker.lose(connection.session)
        self._settle_seat(connection.seat)

    def _bury(self, seat: Seat) -> None:
        """A process has ended, though a child of it may hold its sockets open."""
        for connection in list(seat.connections):
            # What it said before its end counts.
            self._read(connection)
            self._drop(connection, None)
        self._remove(seat)
        self._broker.bury(seat.process)
        self.flush()

    def _settle_seat(self, seat: Seat) -> None:
        """Forgets a process that has no connection and holds nothing."""
        if not seat.connections and not self._broker.holds(seat.process):
            self._remove(seat)

    def _remove(self, seat: Seat) -> None:
        if self._seats.pop((seat.process.pid, seat.process.start), None) is not None:
            self._loop.remove_reader(seat.descriptor)
            os.close(seat.descriptor)
            self._roster.discard(seat.process)


def _request_of(data: bytes) -> int:
    """The number of a message of another version, where its header is still like ours."""
    return int.from_bytes(data[8:16], "little") if len(data) >= 16 else 0
