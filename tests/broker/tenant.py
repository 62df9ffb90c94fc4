"""A tenant as small as can be: what it is asked for it gives, where a test does not say otherwise."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch_elastic_mem.broker.protocol import (
    HOST,
    LAST,
    MAX_MESSAGE,
    Ask,
    Bye,
    Close,
    Demand,
    Denied,
    Gave,
    Grant,
    Hello,
    Limits,
    Message,
    Open,
    Opened,
    Refused,
    Report,
    Return,
    Welcome,
    Withdraw,
    decode,
    encode,
)

MiB = 1 << 20
LONG = 20.0
Kind = TypeVar("Kind", bound=Message)


class Tenant:
    """One connection. Answers are waited for; asks are answered while they are."""

    def __init__(self, path: Path, name: str = "tenant", *, hello: bool = True, device: str = HOST) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(path))
        self.asks: deque[tuple[int, Ask]] = deque()
        self.others: deque[tuple[int, Message]] = deque()
        self.answer: Callable[[int, Ask], None] | None = self.give_all
        self.numbers = 0
        self.leases: dict[int, int] = {}
        if hello:
            backend = "host" if device == HOST else "cuda"
            self.welcome = self.ask(Hello(device, backend, device, name, 1 << 40, 1), Welcome)

    def __enter__(self) -> Tenant:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, message: Message, number: int | None = None) -> int:
        if number is None:
            self.numbers += 1
            number = self.numbers
        self.socket.send(encode(number, message))
        return number

    def receive(self, timeout: float = LONG) -> tuple[int, Message] | None:
        """The next message; None at the end of the connection or of the time."""
        if not select.select([self.socket], [], [], timeout)[0]:
            return None
        # A reset is told once, before what was sent: the broker has closed with something unread.
        for _ in range(2):
            with contextlib.suppress(ConnectionResetError):
                data = self.socket.recv(MAX_MESSAGE)
                return decode(data) if data else None
        return None

    def wait(self, number: int, timeout: float = LONG) -> Message:
        """The answer of that number."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            found = self.receive(left)
            if found is None:
                break
            if isinstance(found[1], Ask):
                self.take(*found)
            elif found[0] == number:
                return found[1]
            else:
                self.others.append(found)
        raise AssertionError(f"no answer to {number}")

    def ask(self, message: Message, kind: type[Kind]) -> Kind:
        answer = self.wait(self.send(message))
        assert isinstance(answer, kind), answer
        return answer

    def serve(self, seconds: float) -> None:
        """Answers asks for a while."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            found = self.receive(left)
            if found is not None and isinstance(found[1], Ask):
                self.take(*found)
            elif found is not None:
                self.others.append(found)

    def take(self, number: int, ask: Ask) -> None:
        self.asks.append((number, ask))
        if self.answer is not None:
            self.answer(number, ask)

    def give_all(self, number: int, ask: Ask) -> None:
        self.give(number, ask.account, min(ask.bytes, self.leases[ask.account]))

    def give(self, number: int, account: int, bytes: int, *, coming: int = 0, last: bool = True) -> None:
        self.leases[account] -= bytes
        self.send(Gave(account, LAST if last else 0, bytes, coming), number)

    def open(
        self, name: str = "a", value: int = 0, lease: int = 0, rungs: int = 0b11111, **limits: int
    ) -> int:
        opened = self.ask(Open(name, f"class {value}", Limits(value, **limits), lease), Opened)  # type: ignore[arg-type]
        self.leases[opened.account] = lease
        self.send(Report(opened.account, rungs, lease, 0))
        return opened.account

    def refused(self, message: Message) -> Refused:
        return self.ask(message, Refused)

    def demand(
        self,
        account: int,
        bytes: int,
        want: int = 0,
        *,
        rung: int = 4,
        timeout: float = 10.0,
        **group: object,
    ) -> int:
        """Sends a demand and does not wait."""
        limit = int(timeout * 1e6)
        return self.send(Demand(account, rung, bytes, max(bytes, want), limit, **group))  # type: ignore[arg-type]

    def granted(self, number: int) -> int:
        answer = self.wait(number)
        assert isinstance(answer, Grant), answer
        self.leases[answer.account] += answer.bytes
        return answer.bytes

    def denied(self, number: int) -> Denied:
        answer = self.wait(number)
        assert isinstance(answer, Denied), answer
        return answer

    def get(self, account: int, bytes: int, want: int = 0, **how: object) -> int:
        return self.granted(self.demand(account, bytes, want, **how))  # type: ignore[arg-type]

    def put(self, account: int, bytes: int) -> None:
        self.leases[account] -= bytes
        self.send(Return(account, bytes))

    def withdraw(self, number: int) -> None:
        self.send(Withdraw(), number)

    def close_account(self, account: int) -> None:
        self.send(Close(account))

    def bye(self) -> None:
        self.send(Bye())
        self.socket.close()


def ended(tenant: Tenant) -> bool:
    """The broker has closed the connection."""
    tenant.socket.settimeout(LONG)
    try:
        return tenant.socket.recv(1) == b""
    except ConnectionResetError:
        return True
