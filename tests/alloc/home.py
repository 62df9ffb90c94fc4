"""An arena with one account and its malloc."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.alloc.mirror import G, PoolId
from tests.rungs import Rung
from torch_elastic_mem import _C


class Home:
    def __init__(self, rung: Rung, capacity: int = 32 * G, reserve: tuple[int, int] = (0, 0)) -> None:
        self.arena = rung.arena(capacity, reserve=reserve)
        self.account = self.arena.account("training")
        self.heap = _C.Allocator(self.account._core, "training")

    @contextmanager
    def pool(self, pool: PoolId, *streams: int) -> Iterator[None]:
        """What is allocated within on the streams comes from the pool, which lives on."""
        self.heap.begin_pool(pool, set(streams or (0,)))
        yield
        self.heap.end_pool(pool)

    def free_all(self) -> None:
        for segment in self.heap.segments():
            for address, _, _, state in segment["blocks"]:
                if state == "live":
                    self.heap.free(address)

    def close(self) -> None:
        self.heap.close()
        self.arena.collect()
        self.account.close()
        self.arena.close()
