"""What bench_trim times of ours and of the bare driver, each beside the same queued work."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch_elastic_mem as tem
from benchmarks.floor import Floor
from benchmarks.trim_load import Load
from torch_elastic_mem.elastic_range import ElasticRange

GRANTED = "granted"
RELEASED = "released"
Turn = dict[str, Any]


class Trims:
    """An account with a cache of free blocks, and another that wants a part of it.

    Args:
        arena: of capacity `cache`, with no reserve: what one account takes, another must give.
        load: the work queued behind the frees.
        cache: bytes of free blocks.
        back: bytes that are taken from it.
        block: bytes of each block.
    """

    def __init__(self, arena: tem.Arena, load: Load, cache: int, back: int, block: int) -> None:
        self._arena = arena
        self._load = load
        self._cache = cache
        self._back = back
        self._block = block
        self._training = arena.account("training", "training")
        self._serving = arena.account("serving", "serving")
        self._core = self._training.allocator()

    def turn(self) -> Turn:
        """One reading of each case; leaves the device as it was."""
        found: Turn = {}
        with closing(self._serving.range(self._back)) as wanted:
            self._fill()
            found[GRANTED] = self._granted(wanted)
            wanted.shrink(self._back)
        self._load.finish()
        self._arena.collect()
        self._fill()
        found[RELEASED] = self._released()
        self._training.trim()
        self._arena.set_capacity(self._cache)
        extent = found[GRANTED]["extent"]
        with Floor(self._arena.device, self._back, extent) as floor:
            floor.take()
            found[f"floor {GRANTED}"] = self._beside(floor.handover)
            found[f"floor {RELEASED}"] = self._beside(floor.give)
        return found

    def close(self) -> None:
        """Closes the accounts."""
        self._training.close()
        self._serving.close()

    def _fill(self) -> None:
        """Makes the cache: blocks that fill the arena, all free again."""
        blocks = [
            self._core.allocate(self._block, self._load.stream) for _ in range(self._cache // self._block)
        ]
        self._load.finish()
        for block in blocks:
            self._core.free(block)

    def _granted(self, wanted: ElasticRange) -> Turn:
        before = self._core.stats()
        turn = self._beside(lambda: _timed(lambda: wanted.grow(self._back)))
        after = self._core.stats()
        given = before["reserved_bytes"]["all"]["current"] - after["reserved_bytes"]["all"]["current"]
        extents = after["unmaps"] - before["unmaps"]
        turn |= {"given": given, "extents": extents, "extent": whole_extent(given, extents, self._back)}
        return turn

    def _released(self) -> Turn:
        def lower() -> None:
            left = self._arena.set_capacity(self._cache - self._back)
            if left:
                raise tem.TemError(f"{tem.format_bytes(left)} did not come back")

        turn = self._beside(lambda: _timed(lower))
        turn["created"] = self._arena.snapshot().created
        return turn

    def _beside(self, call: Callable[[], int]) -> Turn:
        """Queues the load and calls; nanoseconds, and whether the load was done by then."""
        self._load.queue()
        spent = call()
        drained = self._load.drained()
        self._load.finish()
        return {"ns": spent, "drained": drained}


def whole_extent(given: int, extents: int, size: int) -> int:
    """The size of extents that divides `size` and is nearest to those given, from below."""
    extent = 2 << 20
    while extents and 2 * extent <= given // extents and size % (2 * extent) == 0:
        extent *= 2
    return extent


def _timed(call: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start
