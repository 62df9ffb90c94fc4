"""The tenants' socket: connections, and the processes behind them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import select
import socket
from collections import deque
from collections.abc import Iterator
from itertools import count

import msgspec

from torch_elastic_mem import _C
from torch_elastic_mem.broker.basket import MOST_DESCRIPTORS
from torch_elastic_mem.broker.broker import Broker
from torch_elastic_mem.broker.descriptor import Descriptor
from torch_elastic_mem.broker.door import Door, Seat
from torch_elastic_mem.broker.protocol import (
    MAX_MESSAGE,
    NOT_PERMITTED,
    WRONG_VERSION,
    Bye,
    Hello,
    Message,
    Pass,
    Passed,
    ProtocolError,
    Refused,
    decode,
    encode,
)
from torch_elastic_mem.broker.roster import Roster
from torch_elastic_mem.broker.rules import kind_of
from torch_elastic_mem.broker.session import Process, Session
from torch_elastic_mem.errors import BrokerError, TemError

# Messages that wait for a process to read. One that is so far behind has stopped listening.
MOST_UNREAD = 1024
# Connections heard in one turn: meanwhile the teller waits.
TURN = 4
# Messages of a process that has ended.
MOST_UNHEARD = 1024

log = logging.getLogger(__name__)


class Connection:
    """One connection of a process. The teller reads it, but while the server has a message of it in hand."""

    __slots__ = ("number", "seat", "session", "socket", "unread")

    def __init__(self, number: int, connected: socket.socket, seat: Seat[Connection]) -> None:
        self.number = number
        self.socket = connected
        self.seat = seat
        self.session: Session | None = None
        self.unread: deque[bytes] = deque()


class Server:
    """Takes tenants' messages to a broker and brings them its own.

    A thread of C++, the teller, reads them, and answers by itself what needs no decision. It and the broker
    take turns: whoever touches the broker does so within `turn`.

    Not thread-safe: it lives in one asyncio loop, which must be running.
    """

    def __init__(self, broker: Broker, listener: socket.socket, roster: Roster) -> None:
        self._broker = broker
        self._roster = roster
        self._loop = asyncio.get_running_loop()
        self._teller = _C.Teller()
        self._in_turn = False
        self._numbers = count(1)
        self._connections: dict[int, Connection] = {}
        self._by_session: dict[Session, Connection] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wake = math.inf
        self._door: Door[Connection] = Door(listener, self, self._note)
        self._loop.add_reader(self._teller.descriptor, self._called)

    @property
    def connections(self) -> int:
        """How many there are."""
        return self._door.connections

    def knows(self, pid: int, start: int) -> bool:
        """Whether a process, by its number and the tick it started at, has connected."""
        return self._door.knows(pid, start)

    def close(self) -> None:
        """Stops. Connections end, and tenants keep what they hold."""
        self._loop.remove_reader(self._teller.descriptor)
        if self._timer is not None:
            self._timer.cancel()
        self._teller.close()
        for connection in self._connections.values():
            self._loop.remove_writer(connection.socket)
            connection.socket.close()
        self._door.close()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The broker's turn: what the teller has done is written down, and the teller waits.

        At its end, what the broker has to say is sent, so that no answer of the teller's overtakes it.
        """
        if self._in_turn:
            yield
            return
        tills = self._broker.tills
        # The most of it before, while the teller goes on.
        self._teller.begin_turn()
        notes = tills.notes()
        self._teller.end_turn()
        tills.write(notes)
        self._teller.begin_turn()
        self._in_turn = True
        with contextlib.ExitStack() as end:
            # From the last to the first, each also where one before it fails.
            end.callback(self._end_turn)
            end.callback(tills.open)
            end.callback(self._flush)
            tills.write(tills.notes())
            yield

    def _end_turn(self) -> None:
        self._in_turn = False
        self._teller.end_turn()

    # Coming.

    def most(self, uid: int) -> int:
        """How many connections a user may have."""
        return self._broker.connections_of(uid)

    def welcome(self, connected: socket.socket, seat: Seat[Connection]) -> Connection:
        """Takes a connection in."""
        connection = Connection(next(self._numbers), connected, seat)
        with self.turn():
            self._teller.add(connection.number, connected.fileno())
        self._connections[connection.number] = connection
        return connection

    def refuse(self, connected: socket.socket, reason: str) -> None:
        """Says why a connection is not taken in."""
        connected.send(encode(0, Refused(NOT_PERMITTED, reason)))

    def _note(self, process: Process, comes: bool) -> None:
        if comes:
            self._roster.add(process)
        else:
            self._roster.discard(process)

    # Hearing.

    def _called(self) -> None:
        """The teller has messages for the broker, or much to write down."""
        with self.turn():
            for _ in range(TURN):
                letter = self._teller.take()
                if letter is None:
                    return
                number, heard = letter
                self._hear(self._connections[number], *heard)

    def _hear(self, connection: Connection, data: bytes, descriptors: list[int]) -> None:
        """Does what a process has said, and has the teller read on."""
        if connection.session is None:
            self._hear_out_ended(connection.seat)
        try:
            if self._take(connection, data, descriptors):
                # A RETURN, and the DEMAND behind it.
                more = self._receive(connection)
                if more is not None:
                    self._take(connection, *more)
        finally:
            try:
                self._teller.resume(connection.number)
            except BrokerError as error:
                self._drop(connection, str(error))

    @staticmethod
    def _receive(connection: Connection) -> tuple[bytes, list[int]] | None:
        """The next message and its descriptors; nothing at the end of the connection. None: none yet."""
        for _ in range(2):
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    connection.socket, MAX_MESSAGE + 1, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue  # told once, before what was sent: the other end closed with something unread
            except OSError:
                break
            return data, descriptors
        return b"", []

    def _take(self, connection: Connection, data: bytes, numbers: list[int]) -> bool:
        """Does what one message says. False: the connection has ended."""
        # Closed, unless somebody keeps them.
        descriptors = tuple(map(Descriptor, numbers))
        if not data:
            self._drop(connection, None)
            return False
        try:
            request, message = decode(data)
            if isinstance(message, Pass):
                message = msgspec.structs.replace(message, descriptors=descriptors)
            self._handle(connection, request, message)
        except ProtocolError as error:
            if error.wrong_version and connection.session is None:
                refused = encode(_request_of(data), Refused(WRONG_VERSION, str(error)))
                with contextlib.suppress(OSError):
                    connection.socket.send(refused)
            self._drop(connection, str(error))
        if self._broker.post:
            self._send()
        return connection.number in self._connections

    def _handle(self, connection: Connection, request: int, message: Message) -> None:
        session = connection.session
        if session is not None:
            if isinstance(message, Bye):
                self._detach(connection)
                self._broker.leave(session)
                self._settle_seat(connection.seat)
            else:
                self._broker.receive(session, request, message)
            return
        if not isinstance(message, Hello):
            raise ProtocolError("a connection begins with HELLO")
        try:
            session = self._broker.hello(connection.seat.process, request, message)
        except TemError as error:
            self._post(connection, encode(request, Refused(kind_of(error), str(error))))
            return
        connection.session = session
        self._by_session[session] = connection
        till = self._broker.books[message.device].accounts.till
        self._teller.seat(connection.number, till, session.number)

    # Speaking.

    def _flush(self) -> None:
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
        with self.turn():
            self._broker.tick()

    def _send(self) -> None:
        while post := self._broker.post:
            letters = list(post)
            post.clear()
            for session, request, message in letters:
                connection = self._by_session.get(session)
                if connection is None:
                    continue
                if isinstance(message, Passed):
                    self._pass(connection, request, message)
                else:
                    self._post(connection, encode(request, message))

    @staticmethod
    def _pass(connection: Connection, request: int, message: Passed) -> None:
        """Sends memory on, or leaves it to the device: the grant behind it is good without."""
        numbers = [each.number for each in message.descriptors]
        if not connection.unread:
            with contextlib.suppress(OSError):
                socket.send_fds(connection.socket, [encode(request, message)], numbers)
        for descriptor in message.descriptors:
            descriptor.close()

    def _post(self, connection: Connection, data: bytes) -> None:
        if connection.unread:
            connection.unread.append(data)
            if len(connection.unread) > MOST_UNREAD:
                self._drop(connection, f"it has not read {MOST_UNREAD} messages")
            return
        if not self._say(connection, data):
            connection.unread.append(data)
            self._teller.mute(connection.number, True)
            self._loop.add_writer(connection.socket, self._write, connection)

    def _write(self, connection: Connection) -> None:
        with self.turn():
            while connection.unread:
                if not self._say(connection, connection.unread[0]):
                    return
                connection.unread.popleft()
            self._loop.remove_writer(connection.socket)
            self._teller.mute(connection.number, False)

    @staticmethod
    def _say(connection: Connection, data: bytes) -> bool:
        """Sends a message, which nobody hears where the process has ended. False: later."""
        try:
            connection.socket.send(data)
        except OSError as error:
            # ENOBUFS passes, as a full socket does. Every other error is the end of the connection, and who
            # reads it comes to that behind all that the process has said.
            return not isinstance(error, BlockingIOError) and error.errno != errno.ENOBUFS
        return True

    # Going.

    def bury(self, seat: Seat[Connection]) -> None:
        """A process has ended, though a child of it may hold its sockets open."""
        with self.turn():
            for connection in list(seat.connections):
                self._hear_out(connection)
                self._drop(connection, None)
            self._door.remove(seat)
            self._broker.bury(seat.process)

    def _hear_out_ended(self, seat: Seat[Connection]) -> None:
        """A process that comes back has said all that it will say over connections that it has ended.

        Or its accounts, not lost yet, would be opened a second time beside themselves.
        """
        ended = select.poll()
        numbers = {each.socket.fileno(): each for each in seat.connections if each.session is not None}
        for number in numbers:
            ended.register(number, 0)
        for number, _ in ended.poll(0):
            self._hear_out(numbers[number])
            self._drop(numbers[number], None)

    def _hear_out(self, connection: Connection) -> None:
        """What a process said before its end counts. A child of it may go on for ever."""
        heard = self._teller.remove(connection.number)
        if heard is None:
            heard = self._receive(connection)
        for _ in range(MOST_UNHEARD):
            if heard is None or not self._take(connection, *heard):
                return
            heard = self._receive(connection)

    def _detach(self, connection: Connection) -> None:
        """Ends a connection's socket, which the teller has let go of before."""
        if self._connections.pop(connection.number, None) is None:
            return
        if (unheard := self._teller.remove(connection.number)) is not None:
            for number in unheard[1]:
                os.close(number)
        self._loop.remove_writer(connection.socket)
        self._door.leave(connection, connection.seat)
        if connection.session is not None:
            self._by_session.pop(connection.session, None)

    def _drop(self, connection: Connection, reason: str | None) -> None:
        """A connection has ended without BYE, or is ended for a reason."""
        if connection.number not in self._connections:
            return
        process = connection.seat.process
        if reason is not None:
            log.warning("closed a connection of process %d (user %d): %s", process.pid, process.uid, reason)
        self._detach(connection)
        if connection.session is not None:
            self._broker.lose(connection.session)
        self._settle_seat(connection.seat)

    def _settle_seat(self, seat: Seat[Connection]) -> None:
        """Forgets a process that has no connection and holds nothing."""
        if not seat.connections and not self._broker.holds(seat.process):
            self._door.remove(seat)


def _request_of(data: bytes) -> int:
    """The number of a message of another version, where its header is still like ours."""
    return int.from_bytes(data[8:16], "little") if len(data) >= 16 else 0
