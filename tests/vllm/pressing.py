"""Somebody who wants an engine's memory while it serves, in the engine's process."""

from __future__ import annotations

import threading
from itertools import cycle
from typing import Any

MiB = 1 << 20


def confine(arena: Any, cache: Any) -> None:
    """On a GPU the arena has all of the device: what others take is to be the cache's memory."""
    if arena.backend == "cuda":
        size = cache.num_blocks * cache.block_bytes
        arena.set_reserve(0, 0)
        arena.set_capacity(-(-size // arena.granularity) * arena.granularity)


class Pressing:
    """Somebody of a higher class in this process, who takes up to three quarters and gives them back.

    The rung is the dearest that others are asked for.
    """

    def __init__(self, worker: Any, rung: str = "pause") -> None:
        import torch_elastic_mem as tem

        self.arena, self.cache = worker.elastic_arena, worker.elastic_cache
        confine(self.arena, self.cache)
        self.account = self.arena.account("pressing", tem.PriorityClass("pressing", 10**6))
        self.range = self.account.range("1GiB")
        self._rung = rung
        self.met: list[bool] = []
        self.least = self.arena.capacity
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._press)

    def __enter__(self) -> Pressing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _press(self) -> None:
        import torch_elastic_mem as tem

        parts = cycle((0.75, 0.25, 0.5))  # the most at first: on a fast machine there is no second time
        while not self._done.wait(0.05):
            wanted = int(next(parts) * self.arena.capacity) // (2 * MiB) * 2 * MiB
            try:
                with self.account.reserve(wanted, timeout=30.0, rung=self._rung):
                    self.range.grow(wanted)
            except tem.OutOfMemory:
                self.met.append(False)
                continue
            self.met.append(True)
            self.least = min(self.least, self.cache.resident_bytes)
            self._done.wait(0.1)
            self.range.shrink(wanted)
            # A request must get on between two squeezes, on a slow machine too.
            self._done.wait(0.2)
