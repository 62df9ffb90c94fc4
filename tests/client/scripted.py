"""A broker that does what the test says, and keeps the books that a broker would keep."""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch_elastic_mem as tem
from torch_elastic_mem.broker.protocol import (
    IN_USE,
    INVALID,
    LAST,
    OUT_OF_MEMORY,
    Ask,
    Bye,
    Close,
    Demand,
    Denied,
    Done,
    Gave,
    Grant,
    Hello,
    Limits,
    Message,
    Open,
    Opened,
    Pass,
    Passed,
    Refused,
    Return,
    Set,
    SetLimits,
    Welcome,
    decode,
    encode,
)
from torch_elastic_mem.elastic_range import ElasticRange

MiB = 1 << 20
Kind = TypeVar("Kind", bound=Message)
# What it answers to a demand: a message, or None for not yet.
Policy = Callable[[Demand], Message | None]


def idle(account: tem.Account, nbytes: int) -> ElasticRange:
    """Memory that nobody uses, in extents of 4 MiB."""
    memory = account.range(nbytes, keep=nbytes, extent="4MiB")
    memory.grow(nbytes)
    memory.shrink(nbytes)
    return memory


def close(passed: list[tuple[int, int]]) -> None:
    for _, descriptor in passed:
        os.close(descriptor)


class Scripted:
    """Listens at a path until it is closed. Thread-safe, but for one test at a time."""

    def __init__(self, directory: Path, free: int = 64 * MiB, epoch: int = 1) -> None:
        self.path = str(directory / "tenants.sock")
        self.epoch = epoch
        self.free = free
        self.policy: Policy = self.grant_what_is_free
        self.limits: Limits | None = None  # in force, whatever is asked for
        self.refuse_hello: bytes | None = None
        self.mute = False  # accounts are opened and closed, and nobody is told until `speak`
        self._untold: list[tuple[int, Message]] = []
        self.late: Grant | None = None  # to the last demand, under way when an account is closed
        self.charged: dict[int, int] = defaultdict(int)
        self.names: dict[int, str] = {}
        self._open: set[str] = set()  # names, on the connection that came last
        self.log: list[tuple[int, Message]] = []
        self._answers: dict[int, queue.Queue[Gave]] = {}
        self._passed: list[tuple[int, int]] = []
        self._next = 1
        self._changed = threading.Condition()
        self._awake = threading.Event()
        self._awake.set()
        self._stop_reader, self._stop = socket.socketpair()
        Path(self.path).unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind(self.path)
        self._listening.listen()
        self._clients: list[socket.socket] = []
        self._greeted: list[socket.socket] = []
        self._cut: list[socket.socket] = []
        self._ended = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    # What tests ask for.

    def ask(
        self, account: int, nbytes: int, rung: int = 0, timeout: float = 5.0, flags: int = 0
    ) -> list[Gave]:
        """Sends an ASK and returns its answers, the last included."""
        answers: queue.Queue[Gave] = queue.Queue()
        with self._changed:
            number = self._next
            self._next += 1
            self._answers[number] = answers
        self.send(number, Ask(account, rung, nbytes, int(timeout * 1e6), "other/1", flags))
        got = [answers.get(timeout=10)]
        while not got[-1].flags & LAST:
            got.append(answers.get(timeout=10))
        return got

    def send(self, request: int, message: Message, descriptors: list[int] | None = None) -> None:
        socket.send_fds(self._clients[-1], [encode(request, message)], descriptors or [])

    def passed(self) -> list[tuple[int, int]]:
        """The extents that have been passed on: their bytes and descriptors, the test's to close."""
        with self._changed:
            found, self._passed = self._passed, []
        return found

    def speak(self) -> None:
        self.mute = False
        for number, message in self._untold:
            self.send(number, message)

    def send_raw(self, data: bytes) -> None:
        self._clients[-1].send(data)

    def set_limits(self, account: int, priority: str, limits: Limits) -> None:
        self.send(0, Set(account, priority, limits))

    def last(self, kind: type[Message]) -> int:
        """The number of the request of a kind that came last."""
        with self._changed:
            return [number for number, message in self.log if isinstance(message, kind)][-1]

    def got(self, kind: type[Kind]) -> list[Kind]:
        """The messages of a kind that have come."""
        with self._changed:
            return [message for _, message in self.log if isinstance(message, kind)]

    def await_count(self, kind: type[Kind], count: int, timeout: float = 30.0) -> list[Kind]:
        """The messages of a kind once there are so many of them."""
        with self._changed:
            enough = self._changed.wait_for(
                lambda: sum(isinstance(message, kind) for _, message in self.log) >= count, timeout
            )
            found = [message for _, message in self.log if isinstance(message, kind)]
        assert enough, f"{len(found)} of {count} {kind.__name__} after {timeout} s: {self.log}"
        return found

    def await_charge(self, nbytes: int, timeout: float = 30.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: sum(self.charged.values()) == nbytes, timeout), dict(
                self.charged
            )

    def await_ended(self, count: int, timeout: float = 30.0) -> None:
        """So many connections have been ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended >= count, timeout), self._ended

    def answer(self, message: Message, passed: list[tuple[int, int]] | None = None) -> None:
        """To the demand that came last, with memory passed on."""
        number = self.last(Demand)
        if isinstance(message, Grant):
            self.charged[message.account] += message.bytes
            for nbytes, descriptor in passed or []:
                self.send(number, Passed(message.account, 1, nbytes), [descriptor])
        self.send(number, message)

    def grant_what_is_free(self, demand: Demand) -> Message:
        left = self.free - sum(self.charged.values())
        if demand.bytes > left:
            return Denied(OUT_OF_MEMORY, f"{left} bytes are free; others hold the rest")
        return Grant(demand.account, min(demand.want, left))

    def drop(self) -> None:
        """Ends the connections; the listening socket stays."""
        for client in list(self._clients):
            self._cut.append(client)
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def stand_still(self) -> None:
        """Hears nothing any more, and takes no connection, until it is closed."""
        self._awake.clear()

    def close(self) -> None:
        self._awake.set()
        if self._listening.fileno() < 0:
            return
        self._stop.send(b"x")
        self._thread.join(10)
        for end in (self._listening, self._stop, self._stop_reader, *self._clients):
            end.close()

    # The thread.

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._listening, self._stop_reader, *self._clients], [], [])
            self._awake.wait()
            for end in ready:
                if end is self._stop_reader:
                    return
                if end is self._listening:
                    self._clients.append(self._listening.accept()[0])
                else:
                    self._receive(end)

    def _receive(self, client: socket.socket) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(client, 8192, 253)
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._clients.remove(client)
            client.close()
            with self._changed:
                self._ended += 1
                self._changed.notify_all()
            return
        if client in self._cut:
            return
        number, message = decode(data)
        if client not in self._greeted:
            assert isinstance(message, Hello), f"a connection begins with HELLO, not {message}"
            self._greeted.append(client)
        if isinstance(message, Pass):
            assert len(descriptors) == message.count
            with self._changed:
                self._passed += [(message.bytes, descriptor) for descriptor in descriptors]
        reply = self._book(number, message)
        if reply is not None:
            with suppress(BrokenPipeError):  # cut meanwhile
                client.send(reply if isinstance(reply, bytes) else encode(number, reply))

    def _book(self, number: int, message: Message) -> Message | bytes | None:
        reply: Message | bytes | None = None
        if isinstance(message, Hello):
            self.charged.clear()
            self._open.clear()
            reply = self.refuse_hello or Welcome(self.epoch, self.free)
        elif isinstance(message, Open) and message.name in self._open:
            reply = Refused(INVALID, f"account '{message.name}' exists already")
        elif isinstance(message, Open):
            self._open.add(message.name)
            account = 100 + len(self.names)
            self.names[account] = message.name
            self.charged[account] = message.lease
            reply = Opened(account, self.limits or message.limits)
            if self.mute:
                self._untold.append((number, reply))
                reply = None
        elif isinstance(message, Close):
            if self.late is not None:
                late, self.late = self.late, None
                self.answer(late)
            held = self.charged[message.account]
            reply = Done() if held == 0 else Refused(IN_USE, f"{held} bytes are leased to it")
            if held == 0:
                del self.charged[message.account]
                self._open.discard(self.names[message.account])
            if self.mute:
                self._untold.append((number, reply))
                reply = None
        elif isinstance(message, SetLimits):
            reply = Done()
        elif isinstance(message, Demand):
            reply = self.policy(message)
            if isinstance(reply, Grant):
                self.charged[reply.account] += reply.bytes
        elif isinstance(message, Return | Gave):
            self.charged[message.account] -= message.bytes
            assert self.charged[message.account] >= 0
        with self._changed:
            self.log.append((number, message))
            if isinstance(message, Gave) and number in self._answers:
                self._answers[number].put(message)
            self._changed.notify_all()
        return reply


__all__ = ["Bye", "Scripted"]
