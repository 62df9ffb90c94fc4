"""An engine's pool, cache and controller, without the engine, and somebody who wants its memory."""

from __future__ import annotations

import threading
from typing import Any

import torch_elastic_mem as tem
from tests.arena.watch import comes_true
from tests.vllm.pools import free_ids, pool_of, take
from torch_elastic_mem.integrations.vllm.balloon import Balloon
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.compat import Region
from torch_elastic_mem.integrations.vllm.controller import Controller
from torch_elastic_mem.integrations.vllm.demand import Needs

MiB = 1 << 20
BLOCKS = 32
CHUNK = 2 * MiB  # two blocks
LONG = 600.0  # longer than a test may take


class Engine:
    """32 blocks of 1 MiB on an arena that has room for all of them and `more` bytes, or on another."""

    def __init__(self, resident: int, more: int = 0, arena: tem.Arena | None = None) -> None:
        self.arena = arena or tem.Arena("host", capacity=BLOCKS * MiB + more, reserve=(0, 0), broker=None)
        region = Region(BLOCKS * MiB, MiB)
        self.cache = ElasticCache(self.arena.account("engine", "serving"), BLOCKS, [region])
        assert (self.cache.chunk_blocks, self.cache.freed_bytes) == (2, CHUNK)
        self.cache.ensure(range(resident))
        self.pool = pool_of(BLOCKS)
        self.read: set[int] = set()  # by a KV connector
        self.deferred: list[list[Any]] = []  # blocks of requests that are gone, for a step in flight
        self.balloon = Balloon(
            self.pool, 2, resident, lambda: self.read, lambda: sum(map(len, self.deferred))
        )
        self.requests: list[list[Any]] = []
        self.preempted_by: list[int] = []
        self.needs = Needs(0, 0, 0)
        self.controller = Controller(self.cache, self.balloon, self.preempt, lambda: self.needs)
        self.pressing = self.arena.account("pressing", tem.PriorityClass("pressing", 10**6)).range("64MiB")

    def preempt(self) -> bool:
        if not self.requests:
            return False
        self.preempted_by.append(threading.get_ident())
        self.pool.free_blocks(self.requests.pop())
        return True

    def hold(self, *ids: int) -> None:
        self.requests.append(take(self.pool, ids))

    def step(
        self, needed: int = 0, ahead: int = 0, high: int | None = None, least: int | None = None
    ) -> None:
        with self.controller.lock:
            before, least = self.needs, needed if least is None else least
            self.needs = Needs(before.running, max(before.least, least), max(before.most, needed))
            self.controller.before_step(ahead, ahead if high is None else high)
            self.needs = before

    def scheduled(self) -> None:
        with self.controller.lock:
            self.controller.step_scheduled()

    def without_memory(self) -> set[int]:
        ((part, _),) = self.cache._parts
        return {block for block in range(BLOCKS) if not part.is_resident(block)}

    def assert_sound(self) -> None:
        """What the pool may hand out, and what is held, has memory; the books agree."""
        held = {block.block_id for request in self.requests for block in request}
        assert not self.without_memory() & ({0, *free_ids(self.pool)} | held)
        assert self.cache.resident_bytes == CHUNK * (BLOCKS // 2 - self.balloon.parked)
        assert self.balloon.in_use() == len(held)

    def demands(self) -> list[str]:
        """The rungs of those that wait."""
        with self.controller.lock:
            return [demand.rung for demand in self.controller._demands]


class Demand:
    """Somebody of a higher class on a thread of its own, who wants memory and waits for it."""

    def __init__(self, engine: Engine, nbytes: int) -> None:
        self.got: bool | None = None
        self._engine, self._nbytes = engine, nbytes
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._engine.pressing.grow(self._nbytes, timeout=LONG)
            self.got = True
        except tem.OutOfMemory:
            self.got = False

    def waits(self, rung: str = "evict") -> bool:
        return comes_true(lambda: self._engine.demands() == [rung])

    def ended(self) -> bool | None:
        self.thread.join()
        return self.got
