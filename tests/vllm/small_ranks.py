"""Two ranks and their scheduler's side in one process, without an engine, each on an arena of its own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch_elastic_mem as tem
from tests.arena.watch import comes_true
from tests.rungs import Rung
from torch_elastic_mem.integrations.vllm import line
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.compat import Region
from torch_elastic_mem.integrations.vllm.rank import Rank
from torch_elastic_mem.integrations.vllm.ranks import Ranks

MiB = 1 << 20
BLOCKS = 32
CHUNK = 2 * MiB  # two blocks


class One:
    """A rank: 32 blocks of 1 MiB, and an arena that has room for so many bytes."""

    def __init__(self, arena: tem.Arena) -> None:
        self.arena = arena
        self.cache = ElasticCache(arena.account("engine", "serving"), BLOCKS, [Region(BLOCKS * MiB, MiB)])
        # Over the fake driver torch has no device, and no stream of its own.
        self.cache.use_stream = lambda: None  # type: ignore[method-assign]
        self.rank: Rank

    def join(self, number: int, path: str) -> None:
        caller = line.call(path)
        caller.send(line.Hello(number, self.cache.num_blocks, self.cache.chunk_blocks, True))
        welcome = caller.receive()
        assert isinstance(welcome, line.Welcome)
        self.cache.set_chunks(welcome.chunk_blocks)
        group = tem.Group(welcome.group, welcome.members) if self.arena.broker else None
        self.rank = Rank(self.cache, caller, group)

    def step(self, number: int, *, enqueued: bool = True) -> None:
        self.rank.step_begins(number)
        if enqueued:
            self.rank.step_enqueued()

    @property
    def heard(self) -> int:
        """Chunks that it was ordered to let go, whether or not it has."""
        with self.rank._changed:
            return self.rank._gone + sum(order.yielded for order in self.rank._due)

    def chunks(self) -> list[int]:
        """Those that have memory."""
        ((part, _),) = self.cache._parts
        return [chunk for chunk in range(BLOCKS // 2) if part.is_resident(2 * chunk)]

    def pressing(self) -> Any:
        """Memory of a higher class on its arena."""
        account = self.arena.account("pressing", tem.PriorityClass("pressing", 10**6))
        return account.range(self.arena.capacity)


class Engine:
    """Both, and what orders them."""

    def __init__(self, arenas: list[tem.Arena]) -> None:
        self.ones = [One(arena) for arena in arenas]
        self.ranks = Ranks(len(arenas))
        door = line.Door()
        joins = [partial(each.join, number, str(door.path)) for number, each in enumerate(self.ones)]
        together(lambda: self.ranks.meet(door), *joins)
        door.close()

    def schedule(self) -> int:
        """A step; its number, as the ranks read it."""
        output = SimpleNamespace()
        self.ranks.number(output)
        return int(output.elastic_step)

    def release(self, *chunks: int) -> None:
        """Until the order has come everywhere; whether it has been carried out is another matter."""
        self.ranks.release(chunks)
        ordered = self.ranks._yielded
        assert comes_true(lambda: all(each.heard == ordered for each in self.ones))

    def chunks(self) -> list[list[int]]:
        return [each.chunks() for each in self.ones]

    def close(self) -> None:
        self.ranks.close()
        for each in self.ones:
            each.rank.close()


def together(*calls: Callable[[], object]) -> None:
    """Each on a thread of its own, until all have ended."""
    failed: list[BaseException] = []

    def run(fn: Callable[[], object]) -> None:
        try:
            fn()
        except BaseException as reason:  # noqa: BLE001  (raised below)
            failed.append(reason)

    threads = [threading.Thread(target=run, args=(each,), daemon=True) for each in calls]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive()
    if failed:
        raise failed[0]


def engine_on(rung: Rung, *capacities: int) -> Engine:
    """A rank on each device, with room for so many bytes."""
    gc.collect()  # an engine of an earlier test is in cycles, and has the device's arena
    devices = ["cuda:0", "cuda:1"] if rung.name == "fake" else [rung.device] * 2
    return Engine([rung.arena(size, device=device) for size, device in zip(capacities, devices, strict=True)])
