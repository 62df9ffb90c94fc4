"""The broker's side of the control socket. Whatever a connection does hurts that connection only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from torch_elastic_mem.broker import control as words
from torch_elastic_mem.broker.state import Event, MachineState
from torch_elastic_mem.errors import BrokerError, InvalidArgument, TemError

if TYPE_CHECKING:
    from torch_elastic_mem.broker.broker import Broker
    from torch_elastic_mem.broker.daemon import Running

# Each connection costs the broker a descriptor, of which tenants need the most.
MOST_CONNECTIONS = 64
# Seconds over an answer, after which a reader is let go.
_SLOWEST_READER = 10.0
# How long one that is refused may take to ask.
_REQUEST_WAIT = 1.0

_CHANGES = (words.LimitsRequest, words.PriorityRequest, words.ReclaimRequest)
_decode = msgspec.json.Decoder(words.AnyRequest).decode
_encode = msgspec.json.Encoder().encode


class Controlled(Protocol):
    """What operators may see and change. All is called on the event loop's thread."""

    def state(self) -> MachineState:
        """The broker at this moment."""

    def events(self, since: int) -> list[Event]:
        """Those after number `since` that it still has, oldest first."""

    def set_limits(self, device: str | None, name: str, **limits: Any) -> int:
        """Changes limits of accounts by name; returns how many, or raises a TemError."""

    def set_priority(self, name: str, priority: str, /) -> int:
        """Changes the class of accounts by name; returns how many, or raises a TemError."""

    async def reclaim(self, name: str, count: int, timeout: float, /) -> int:
        """Has accounts give bytes back within seconds; returns how many came."""


class Operated:
    """A broker that operators look at and change, each time in a turn of its own."""

    def __init__(self, broker: Broker, turn: Callable[[], AbstractContextManager[None]]) -> None:
        self._broker = broker
        self._turn = turn

    def state(self) -> MachineState:
        """As the broker's."""
        with self._turn():
            return self._broker.state()

    def events(self, since: int) -> list[Event]:
        """As the broker's."""
        with self._turn():
            return self._broker.events(since)

    def set_limits(self, device: str | None, name: str, **limits: Any) -> int:
        """As the broker's."""
        with self._turn():
            return self._broker.set_limits(device, name, **limits)

    def set_priority(self, name: str, priority: str) -> int:
        """As the broker's."""
        with self._turn():
            return self._broker.set_priority(name, priority)

    async def reclaim(self, name: str, count: int, timeout: float) -> int:
        """As the broker's; it goes on to its end if who asked goes away."""
        with self._turn():
            coming = self._broker.reclaim(name, count, timeout)
        return await coming


@contextlib.asynccontextmanager
async def control(running: Running) -> AsyncIterator[ControlServer]:
    """A service of the daemon: the control socket, systemd's or one of its own beside the tenants'."""
    given = running.sockets.pop("control", None)
    path = running.paths.control
    listener = given or listen(path, running.config.group is not None)
    server = await ControlServer.start(Operated(running.broker, running.server.turn), listener)
    try:
        yield server
    finally:
        await server.close()
        if given is None:
            path.unlink(missing_ok=True)


def listen(path: Path, by_group: bool) -> socket.socket:
    """Opens a control socket in the place of one that a broker has left behind.

    Args:
        path: of the socket; the caller has its directory to itself.
        by_group: the directory's group may connect, too.

    Raises:
        OSError: it cannot be opened.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(os.fspath(path))
        if by_group:
            os.chown(path, -1, path.parent.stat().st_gid)
        os.chmod(path, 0o660 if by_group else 0o600)
        listener.listen(MOST_CONNECTIONS)
    except BaseException:
        listener.close()
        raise
    return listener


class ControlServer:
    """Answers operators on a listening socket, which it owns. For the event loop's thread alone."""

    def __init__(self, broker: Controlled, server: asyncio.Server, tasks: set[asyncio.Task[None]]) -> None:
        self._broker = broker
        self._server = server
        self._tasks = tasks

    @classmethod
    async def start(cls, broker: Controlled, listener: socket.socket) -> ControlServer:
        """Begins to answer.

        Args:
            broker: what is shown and changed.
            listener: a stream socket that is bound; whom its file's mode lets connect may read.
        """
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await _Connection(broker, reader, writer).serve(full=len(tasks) > MOST_CONNECTIONS)
            except (OSError, TimeoutError):
                pass  # the other side went away, or does not read
            finally:
                tasks.discard(task)
                await _end(writer)

        # The one for Unix sockets would, from Python 3.13 on, remove a file that may be systemd's.
        server = await asyncio.start_server(connected, sock=listener, limit=words.LARGEST_REQUEST)
        return cls(broker, server, tasks)

    async def close(self) -> None:
        """Stops listening and ends every connection."""
        self._server.close()
        ending = list(self._tasks)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)


class _Connection:
    def __init__(
        self, broker: Controlled, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._broker = broker
        self._reader = reader
        self._writer = writer

    async def serve(self, full: bool) -> None:
        """Answers line by line until the other side ends, or says what is no request."""
        if full and not self._may_change():
            # A connection that is closed with a request unread takes the answer with it.
            with contextlib.suppress(TimeoutError, ValueError):
                await asyncio.wait_for(self._reader.readline(), _REQUEST_WAIT)
            await self._send(_refusal(f"the broker already has {MOST_CONNECTIONS} connections of operators"))
            return
        while True:
            try:
                line = await self._reader.readline()
            except ValueError:
                await self._send(_refusal(f"a request is at most {words.LARGEST_REQUEST} bytes long"))
                return
            if not line.endswith(b"\n"):
                return
            try:
                request = _decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                await self._send(_refusal(f"not a request: {error}", "invalid"))
                return
            await self._send(await self._answer(request))

    async def _answer(self, request: words.AnyRequest) -> words.Answer:
        try:
            if isinstance(request, _CHANGES) and not self._may_change():
                me = os.geteuid()
                raise BrokerError(
                    f"only root and user {me}, whose broker this is, may change things; others look"
                )
            return words.Answer(ok=msgspec.Raw(_encode(await self._do(request))))
        except TemError as error:
            kind = next((name for name, kind in words.ERROR_KINDS.items() if isinstance(error, kind)), "")
            return _refusal(str(error), kind)

    def _may_change(self) -> bool:
        """By the kernel's word on who is there, and not by the sender's."""
        connection = self._writer.get_extra_info("socket")
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return struct.unpack("3i", peer)[1] in (0, os.geteuid())

    async def _do(self, request: words.AnyRequest) -> object:
        broker = self._broker
        match request:
            case words.StateRequest():
                return broker.state()
            case words.EventsRequest(since=since):
                return broker.events(since)[: words.EVENTS_A_PAGE]
            case words.LimitsRequest(name=name, device=device):
                if not request.limits():
                    raise InvalidArgument("no limit was given: name one of min, low, high, max and weight")
                return broker.set_limits(device, name, **request.limits())
            case words.PriorityRequest(name=name, priority=priority):
                return broker.set_priority(name, priority)
            case words.ReclaimRequest(name=name, bytes=count, timeout=timeout):
                if count <= 0 or not 0 <= timeout <= 3600:
                    raise InvalidArgument("a reclaim is of at least one byte, within at most an hour")
                return await broker.reclaim(name, count, timeout)

    async def _send(self, answer: words.Answer) -> None:
        self._writer.write(_encode(answer) + b"\n")
        async with asyncio.timeout(_SLOWEST_READER):
            await self._writer.drain()


async def _end(writer: asyncio.StreamWriter) -> None:
    """Lets the other side read what it was told, if it reads."""
    try:
        writer.close()
        async with asyncio.timeout(_SLOWEST_READER):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


def _refusal(message: str, kind: str = "refused") -> words.Answer:
    return words.Answer(error=message, kind=kind)
