"""Between an engine's scheduler and its memory: grows ahead of need, and gives back when asked.

Who does what. The engine's thread calls the scheduler; everything of the scheduler's that changes its block
pool runs under `lock`, and so does all that is done to the pool here. A demand comes on a thread of the
arena's or of another tenant. Blocks that no request holds are given up by that thread itself, so that an idle
engine need not be woken and a busy one is not waited for: what steps on their way may still do to such blocks
is on the stream already, and the memory goes behind it. Only between a step's scheduling and the moment when
the stream has all of its work is that not so; then the engine's thread does it at the end of that span.
Running requests are preempted by the engine's thread alone, before it schedules.

The lock order is `lock`, then the grower's, then those of the arena. Nobody waits for a demand or for memory
with `lock` held, except a step that needs blocks, and that no longer than `PATIENCE`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch_elastic_mem.errors import InUseError
from torch_elastic_mem.integrations.vllm.balloon import Balloon
from torch_elastic_mem.integrations.vllm.grower import Grower
from torch_elastic_mem.integrations.vllm.memory import EngineMemory
from torch_elastic_mem.integrations.vllm.teller import Teller

# What a step waits for memory on its way rather than give up a warm prefix or preempt a request.
PATIENCE = 0.05
# What a growth on its way may take to be refused, before an engine sleeps.
LONGEST = 10.0


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

    def __init__(self, cache: EngineMemory, balloon: Balloon, preempt: Callable[[], bool]) -> None:
        self.lock = threading.RLock()
        self.balloon = balloon
        self.grower = Grower(cache)
        self._cache = cache
        self._preempt = preempt
        self._steps = 0  # scheduled, and not wholly on the stream; all below are guarded by the lock
        self._demands: list[Demand] = []
        self._closed = False
        self._away: list[int] = []  # while all memory is away: the chunks that are not parked
        cache.on_enqueued = self.step_enqueued
        cache.resting = self
        account = cache.account
        self._reclaimers = [
            account.on_reclaim(lambda nbytes, timeout: self._asked(nbytes, timeout, False), "evict"),
            account.on_reclaim(lambda nbytes, timeout: self._asked(nbytes, timeout, True), "shrink"),
        ]
        self._teller = Teller(account, balloon)

    def before_step(self, needed: Callable[[], int], ahead: int) -> None:
        """The engine's thread is about to schedule, with the lock held.

        Args:
            needed: blocks that the step can use at most; asked for only where they may be short.
            ahead: unused blocks to have at hand.
        """
        if self._away:
            return
        self._cache.use_stream()
        self._serve()
        self.balloon.unpark(self.grower.take())
        unused = self.balloon.unused(ahead)
        if unused >= ahead or not self.balloon.parked:
            return
        wanted = needed()
        missing = wanted - unused
        # What is cached and free would serve as well, at the cost of a prefix.
        short = self.balloon.free_blocks < max(ahead, wanted)
        self._grow(max(ahead - unused, missing), short)
        deadline = time.monotonic() + PATIENCE
        while missing > 0 and not self.grower.resting(short) and (left := deadline - time.monotonic()) > 0:
            if not self.grower.coming:
                break
            self.grower.wait(left)
            came = self.grower.take()
            self.balloon.unpark(came)
            missing -= len(came) * self._cache.chunk_blocks

    def step_scheduled(self) -> None:
        """With the lock held."""
        self._steps += 1

    def step_enqueued(self) -> None:
        """The stream has all of a step's work."""
        with self.lock:
            self._steps = max(0, self._steps - 1)
            self._serve_if_safe()

    def usage(self) -> float:
        """The part in use of the blocks that are to be had: of all, until memory is refused."""
        with self.lock:
            blocks = self._cache.num_blocks - 1
            if self.grower.resting():
                blocks -= self.balloon.parked_blocks
            return self.balloon.in_use() / blocks if blocks > 0 else 0.0

    @property
    def away(self) -> bool:
        """Whether all memory is away: nothing is left to be asked for, and nothing grows."""
        with self.lock:
            return bool(self._away)

    @property
    def bytes(self) -> int:
        """What bringing it back takes."""
        with self.lock:
            return len(self._away) * self._cache.chunk_bytes

    def put_away(self) -> None:
        """Gives all memory back, that of the null block too; what is cached is forgotten.

        The engine's thread calls it, when no step is under way.

        Raises:
            InUseError: requests hold blocks. Nothing has been given back.
        """
        self.grower.settle(LONGEST)
        with self.lock:
            if self._away:
                return
            if held := self.balloon.in_use():
                raise InUseError(
                    f"the engine cannot sleep: requests hold {held} of its blocks; pause it in a mode that "
                    "frees them first"
                )
            self.balloon.unpark(self.grower.take())
            parked = self.balloon.cheapest(self.balloon.num_chunks)
            self.balloon.park(parked)
            # Those are left of which vLLM has a block for itself, as the null block.
            self._away = self.balloon.resident()
            self._cache.release([*parked, *self._away])
            self._steps = 0
            self._serve_if_safe()

    def bring_back(self, timeout: float) -> None:
        """Puts memory under the blocks that vLLM has for itself; the rest comes as steps need it.

        Raises:
            OutOfMemory: the memory is not to be had; all of it stays away.
        """
        with self.lock:
            chunks = list(self._away)
        if chunks:
            self._cache.ensure(chunks, timeout=timeout)
            with self.lock:
                self._away.clear()

    def close(self) -> None:
        """Nobody is asked any more, nothing grows, and all memory goes, after what the stream has been given.

        No step may come after. Harmless the second time.
        """
        for reclaimer in self._reclaimers:
            reclaimer.remove()
        self.grower.close()
        self._teller.close()
        with self.lock:
            if self._closed:
                return
            self._closed = True
            self.balloon.unpark(self.grower.take())
            if not self._away:
                self._cache.release(self.balloon.resident())
            for demand in self._demands:
                demand.served.set()
            self._demands.clear()

    def _grow(self, blocks: int, short: bool) -> None:
        if self.grower.resting(short):
            return
        coming = self.grower.coming
        chunks = -(-blocks // self._cache.chunk_blocks) - len(coming)
        if chunks > 0:
            self.grower.ask(self.balloon.next_out(chunks, coming), short)

    def _asked(self, nbytes: int, timeout: float, preempting: bool) -> None:
        demand = Demand(nbytes, preempting)
        with self.lock:
            if self._closed:
                return
            self._demands.append(demand)
            self._serve_if_safe()
        if not demand.served.wait(timeout):
            with self.lock:
                if demand in self._demands:
                    self._demands.remove(demand)

    def _serve_if_safe(self) -> None:
        """Gives up what no request holds, unless a step is between its scheduling and the stream."""
        if self._steps or not self._demands:
            return
        later = []
        for demand in self._demands:
            demand.nbytes -= self._give(demand.nbytes)
            if demand.preempting and demand.nbytes > 0 and self.balloon.in_use():
                later.append(demand)
            else:
                demand.served.set()
        self._demands = later

    def _serve(self) -> None:
        """Gives up what is wanted, and preempts where that is asked for; before scheduling."""
        for demand in self._demands:
            demand.nbytes -= self._give(demand.nbytes)
            while demand.preempting and demand.nbytes > 0 and self._preempt():
                demand.nbytes -= self._give(demand.nbytes)
            demand.served.set()
        self._demands.clear()

    def _give(self, nbytes: int) -> int:
        """Gives up so many bytes, or what there is. What was to come goes first."""
        if nbytes <= 0:
            return 0
        self.grower.cancel()
        self.balloon.unpark(self.grower.take())
        wanted = -(-nbytes // self._cache.freed_bytes)
        chunks = self.balloon.cheapest(wanted)
        if self._cache.freed(chunks) < nbytes:  # the short one is among them, or there are no more
            chunks = self.balloon.cheapest(wanted + 1)
        if chunks:
            self.balloon.park(chunks)
            self._cache.release(chunks)
        return self._cache.freed(chunks)
