"""A client of the broker in a process of its own: `python -m benchmarks.broker_worker ROLE BACKEND`.

A demand is Account.reserve of more than is leased, so it goes to the broker and back; closing the reservation
gives the bytes back by a message that has no answer.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from typing import Any

import torch_elastic_mem as tem
from benchmarks.timing import elapsed_ns
from benchmarks.worker import Handler, serve
from torch_elastic_mem import _C
from torch_elastic_mem.broker.paths import BROKER

MIB = 1 << 20


class Client:
    """Demands of one account, timed."""

    def __init__(self, role: str, backend: str) -> None:
        self._arena = tem.Arena(backend)
        self._account = self._arena.account(role, "serving")
        # What stays leased and unused is bounded: a demand of more always costs a message.
        self._bytes = 66 * MIB
        self._idle: list[_C.Broker] = []
        self._over = threading.Event()
        self._busy: threading.Thread | None = None

    def __call__(self, request: dict[str, Any]) -> Any:
        return getattr(self, request.pop("do"))(**request)

    def time(self, rounds: int, pause: float) -> list[int]:
        """Nanoseconds of each of so many demands, with a pause between them."""
        readings = []
        for _ in range(rounds):
            readings.append(elapsed_ns(lambda: self._account.reserve(self._bytes)))
            self._account._core.unreserve()
            if pause:
                time.sleep(pause)
        return readings

    def connect(self, count: int) -> int:
        """Opens connections that say nothing more than who they are; returns how many there are."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        socket = os.environ[BROKER]
        while len(self._idle) < count:
            self._idle.append(_C.Broker(socket, "HOST", "host", "", "idle", 1 << 34, 2 * MIB, timeout=10.0))
        return len(self._idle)

    def start(self, pause: float) -> None:
        """Demands from now on, with a pause between them, until `stop`."""
        self._over.clear()

        def run() -> None:
            while not self._over.is_set():
                self.time(1, pause)

        self._busy = threading.Thread(target=run)
        self._busy.start()

    def stop(self) -> None:
        assert self._busy is not None
        self._over.set()
        self._busy.join()


def make(role: str, backend: str) -> Handler:
    return Client(role, backend)


if __name__ == "__main__":
    serve(make)
