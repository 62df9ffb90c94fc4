"""Between an engine's scheduler and its memory: grows ahead of need, and gives back when asked.

Who does what. The engine's thread calls the scheduler; everything of the scheduler's that changes its block
pool runs under `lock`, and so does all that is done to the pool here. A demand comes on a thread of the arena's
or of another tenant. Where no step is on its way that thread serves it itself, so that an idle engine need not
be woken; otherwise the engine's thread does at its next safe point: before it schedules, when all earlier steps
have been given to the stream, or when the last step on its way has come back. The lock order is `lock`, then the
grower's, then those of the arena; no one waits for a demand or for memory with `lock` held, except a step that
needs blocks, and that no longer than `PATIENCE`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch_elastic_mem.integrations.vllm.balloon import Balloon
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.grower import Grower

# What a step waits for memory on its way rather than give up a warm prefix or preempt a request.
PATIENCE = 0.05


@dataclass(slots=True, eq=False)
class Demand:
    """Bytes somebody wants of this engine, and whether its running requests may be preempted for it."""

    nbytes: int
    preempting: bool
    served: threading.Event = field(default_factory=threading.Event)


class Controller:
    """One engine's. Thread-safe.

    Args:
        cache: the memory.
        balloon: what the pool may use.
        preempt: takes the blocks of the request that matters least; False when none runs.
    """

    def __init__(self, cache: ElasticCache, balloon: Balloon, preempt: Callable[[], bool]) -> None:
        self.lock = threading.RLock()
        self.balloon = balloon
        self.grower = Grower(cache)
        self._cache = cache
        self._preempt = preempt
        self._steps = 0  # given to the runner, and not come back; all below are guarded by the lock
        self._demands: list[Demand] = []
        account = cache.account
        self._reclaimers = [
            account.on_reclaim(lambda nbytes, timeout: self._asked(nbytes, timeout, False), "evict"),
            account.on_reclaim(lambda nbytes, timeout: self._asked(nbytes, timeout, True), "shrink"),
        ]

    def before_step(self, needed: Callable[[], int], ahead: int) -> None:
        """The engine's thread is about to schedule, with the lock held.

        Args:
            needed: blocks that the step can use at most; asked for only where they may be short.
            ahead: unused blocks to have at hand.
        """
        self._cache.use_stream()
        self._serve()
        self.balloon.unpark(self.grower.take())
        unused = self.balloon.unused(ahead)
        if unused >= ahead or not self.balloon.parked:
            return
        missing = needed() - unused
        self._grow(max(ahead - unused, missing))
        deadline = time.monotonic() + PATIENCE
        while missing > 0 and not self.grower.resting and (left := deadline - time.monotonic()) > 0:
            if not self.grower.coming:
                break
            self.grower.wait(left)
            came = self.grower.take()
            self.balloon.unpark(came)
            missing -= len(came) * self._cache.chunk_blocks

    def step_given(self) -> None:
        """A step has been scheduled; with the lock held."""
        self._steps += 1

    def step_back(self) -> None:
        """Its output has been taken; with the lock held."""
        self._steps -= 1
        if self._steps == 0:
            self._serve(preempting=False)

    def usage(self) -> float:
        """The part in use of the blocks that are to be had: of all, until memory is refused."""
        with self.lock:
            blocks = self._cache.num_blocks - 1
            if self.grower.resting:
                blocks -= self.balloon.parked_blocks
            return self.balloon.in_use() / blocks if blocks > 0 else 0.0

    def close(self) -> None:
        """Nobody is asked any more, and nothing grows."""
        for reclaimer in self._reclaimers:
            reclaimer.remove()
        self.grower.close()
        with self.lock:
            for demand in self._demands:
                demand.served.set()
            self._demands.clear()

    def _grow(self, blocks: int) -> None:
        if self.grower.resting:
            return
        coming = self.grower.coming
        chunks = -(-blocks // self._cache.chunk_blocks) - len(coming)
        if chunks > 0:
            self.grower.ask(self.balloon.next_out(chunks, coming))

    def _asked(self, nbytes: int, timeout: float, preempting: bool) -> None:
        demand = Demand(nbytes, preempting)
        with self.lock:
            self._demands.append(demand)
            if self._steps == 0:
                self._serve(preempting=False)
        if not demand.served.wait(timeout):
            with self.lock:
                if demand in self._demands:
                    self._demands.remove(demand)

    def _serve(self, preempting: bool = True) -> None:
        """Parks what the demands want and lets its memory go; with the lock held.

        Args:
            preempting: whether this is the place to preempt: nothing but the engine's own thread may, and
                only before it schedules. Where no step is on its way no request runs between steps but to be
                scheduled next, and its demand waits for that.
        """
        if not self._demands:
            return
        later = []
        for demand in self._demands:
            freed = self._give(demand.nbytes)
            if demand.preempting and preempting:
                while freed < demand.nbytes and self._preempt():
                    freed += self._give(demand.nbytes - freed)
            elif demand.preempting and freed < demand.nbytes and self.balloon.in_use():
                demand.nbytes -= freed
                later.append(demand)
                continue
            demand.served.set()
        self._demands = later

    def _give(self, nbytes: int) -> int:
        """Gives up so many bytes, or what there is. What was to come goes first."""
        self.grower.cancel()
        self.balloon.unpark(self.grower.take())
        chunks = self.balloon.cheapest(-(-nbytes // self._cache.freed_bytes))
        if chunks:
            self.balloon.park(chunks)
            self._cache.release(chunks)
        return len(chunks) * self._cache.freed_bytes
