"""Between an engine's scheduler and its memory: grows ahead of need, and gives back when asked.

Who does what. The engine's thread calls the scheduler; everything of the scheduler's that changes its block
pool runs under `lock`, and so does all that is done to the pool here. A demand comes on a thread of the
arena's or of another tenant. Blocks that no request holds are given up by that thread itself, so that an idle
engine need not be woken and a busy one is not waited for: what steps on their way may still do to such blocks
is on the stream already, and the memory goes behind it. Only between a step's scheduling and the moment when
the stream has all of its work is that not so; then the engine's thread does it at the end of that span.

Then blocks of running requests are moved, so that sparse chunks come free. A copy costs less than a prefix,
so that is of the rung evict as well; what the next step may use, for those that wait too, stays. What
requests hold costs more. At the rung shrink the engine *drains*: it admits nobody until it has paid what it
was asked for, with memory that comes free as its requests end. At the rung pause, where peers do not ask as
a rule, running requests are preempted. Blocks are moved and requests preempted by the engine's thread alone,
before it schedules.

The lock order is `lock`, then the grower's, then those of the arena. Nobody waits for a demand or for memory
with `lock` held, except a step that needs blocks, and that no longer than `PATIENCE`. A move may wait for the
step in flight to have read its block tables.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

from torch_elastic_mem.errors import InUseError
from torch_elastic_mem.integrations.vllm.balloon import Balloon
from torch_elastic_mem.integrations.vllm.demand import Demand, Needs
from torch_elastic_mem.integrations.vllm.grower import REST, Grower
from torch_elastic_mem.integrations.vllm.memory import CalledOff, EngineMemory
from torch_elastic_mem.integrations.vllm.mover import Mover
from torch_elastic_mem.integrations.vllm.teller import Teller

# What steps wait for memory on its way rather than preempt a request or do nothing: in all, for it may take
# as long as requests of others do.
PATIENCE = 0.05
# What a demand may cost: caches and copies; admissions; running requests.
EVICT, SHRINK, PAUSE = "evict", "shrink", "pause"
# What a growth on its way may take to be refused, before an engine sleeps.
LONGEST = 10.0


class Controller:
    """One engine's. Thread-safe.

    Args:
        cache: the memory.
        balloon: what the pool may use.
        preempt: takes the blocks of the request that matters least; False when none runs.
        needs: of the next step; called with the lock held, where blocks may be short or others want them.
        goes_on: whether steps are to come, before which requests can be preempted; likewise.
    """

    def __init__(
        self,
        cache: EngineMemory,
        balloon: Balloon,
        preempt: Callable[[], bool],
        needs: Callable[[], Needs],
        goes_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self.lock = threading.RLock()
        self.balloon = balloon
        self.grower = Grower(cache, self._grown)
        self._cache = cache
        self._preempt = preempt
        self._needs = needs
        self._goes_on = goes_on
        self.mover: Mover | None = None  # where blocks can move
        self._steps = 0  # scheduled, and not wholly on the stream; all below are guarded by the lock
        self._demands: list[Demand] = []
        self._debt, self._debt_until = 0, 0.0  # bytes to pay as requests end
        self._patient_until = 0.0
        self._short = False  # when it last grew
        self._closed = False
        self._away: list[int] = []  # while all memory is away: the chunks that are not parked
        self.weights_away = False  # as well, or alone: nothing is to run
        cache.on_enqueued = self.step_enqueued
        cache.resting = self
        account = cache.account
        self._reclaimers = [
            account.on_reclaim(partial(self._asked, rung), rung) for rung in (EVICT, SHRINK, PAUSE)
        ]
        self._teller = Teller(account, balloon)

    def before_step(self, low: int, high: int) -> None:
        """The engine's thread is about to schedule, with the lock held.

        Args:
            low: unused blocks to have at hand: for a step, and for the whole of who is admitted next.
            high: unused blocks to get once there are fewer, so that not every prompt grows the cache.
        """
        if self._away:
            return
        self._cache.use_stream()
        if self._demands:
            self._serve()
        if came := self.grower.take():
            self.balloon.unpark(came)
        if self.draining:
            self._pay()
        if not self.balloon.parked or self._demands:
            return
        if self.draining:
            # Who drains takes what is free elsewhere for those that run, and asks nobody for more.
            self._grow(self._needs().running - self.balloon.free_blocks, short=False)
            return
        unused = self.balloon.unused(low)
        if unused >= low:
            self.grower.keep(-(-(high - unused) // self._cache.chunk_blocks), short=False)
            return
        if self.grower.resting(short=True):
            return
        free, needs = self.balloon.free_blocks, self._needs()
        short = free < max(low, needs.most)
        self._grow(max(high - unused, needs.most - free), short)
        # The coldest prefixes serve as well: one that is computed anew costs a request milliseconds, and a
        # wait costs all of them. A step that has something to do does it, and admits the others later.
        missing = needs.least - free
        while missing > 0 and self.grower.coming and not self.grower.resting(short):
            if (left := self._patient_until - time.monotonic()) <= 0:
                break
            self.grower.wait(left)
            came = self.grower.take()
            self.balloon.unpark(came)
            missing -= len(came) * self._cache.chunk_blocks

    @property
    def draining(self) -> bool:
        """Nobody is to be admitted: what comes free is somebody else's. With the lock held."""
        return self._debt > 0

    def step_scheduled(self) -> None:
        """With the lock held."""
        self._steps += 1

    def step_enqueued(self) -> None:
        """The stream has all of a step's work."""
        with self.lock:
            self._steps = max(0, self._steps - 1)
            self._serve_if_safe()

    def reconsider(self) -> None:
        """Requests have ended, or no step is to come: who waits for the next may have no reason to.

        A demand that comes at this moment is served by who brings it.
        """
        if self._demands:
            with self.lock:
                self._serve_if_safe()

    def usage(self) -> float:
        """The part in use of the blocks that are to be had: of all, until memory is refused."""
        with self.lock:
            blocks = self._cache.num_blocks - 1
            if self.grower.refused():
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
            self.balloon.forget(self._away)
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
        if not chunks:
            return
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._cache.ensure(chunks, timeout=max(0.0, deadline - time.monotonic()))
                break
            except CalledOff:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(REST)  # whoever was given it is about to take it
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
            self._debt = 0

    def _grown(self) -> None:
        """The grower's thread has ended what it was doing.

        A step waits for that thread with the lock held, but not while there are demands; and a demand is
        among them before it asks whether the thread works.
        """
        self.reconsider()

    def _grow(self, blocks: int, short: bool) -> None:
        if blocks <= 0 or self.grower.resting(short):
            return
        coming = self.grower.coming
        chunks = max(0, (wanted := -(-blocks // self._cache.chunk_blocks)) - len(coming))
        self.grower.keep(wanted, short)
        dearer = short and not self._short
        if not coming or dearer:
            # What was refused may be refused again, and steps would wait for that over and over.
            patience = 0.0 if self.grower.refused(short) else PATIENCE
            self._patient_until = time.monotonic() + patience
        self._short = short
        if chunks or dearer:
            self.grower.ask(self.balloon.next_out(chunks, [*coming, *self._cache.going()]), short)

    def _asked(self, rung: str, nbytes: int, timeout: float) -> None:
        if rung != EVICT and self.grower.here:
            # At its own limit an engine queues requests. It would drain, and pause them, in order to grow.
            return
        demand = Demand(nbytes, rung, time.monotonic() + timeout)
        # A broker grants nothing to one that answers late, and a step may hold the lock for longer than that.
        if not self.lock.acquire(timeout=max(0.0, timeout)):
            return
        try:
            if self._closed:
                return
            self._demands.append(demand)
            self._serve_if_safe()
        except BaseException:
            demand.over = True
            raise
        finally:
            self.lock.release()
        demand.over = not demand.served.wait(demand.left)

    def _serve_if_safe(self) -> None:
        """Gives up what no request holds, unless a step is between its scheduling and the stream."""
        if self._steps or not self._demands:
            return
        later = []
        for demand in self._waiting():
            self._give_to(demand)
            if demand.nbytes > 0 and self._could_later(demand):
                later.append(demand)
            else:
                self._end(demand)
        self._demands = later

    def _serve(self) -> None:
        """Gives up what is wanted, by moves and, where they are asked for, preemptions; before scheduling."""
        later = []
        for demand in self._waiting():
            while demand.nbytes > 0:
                if self._give_to(demand) or self._compact(demand):
                    continue
                enough = self._coming(demand) >= demand.nbytes
                if demand.rung != PAUSE or enough or not self._preempt():
                    break
            if demand.nbytes > 0 and self._coming(demand):
                later.append(demand)
            else:
                self._end(demand)
        self._demands = later

    def _waiting(self) -> list[Demand]:
        """The demands that somebody waits for."""
        return [demand for demand in self._demands if not demand.over]

    def _coming(self, demand: Demand) -> int:
        """Bytes that come free by themselves, and go before those of running requests.

        What is on its way to this engine, for a moment: what has not been granted waits behind the demand.
        Chunks that a KV connector has yet to copy, and blocks that vLLM keeps for steps in flight.
        """
        if demand.rung == PAUSE and self.grower.working and time.monotonic() < demand.since + PATIENCE:
            return demand.nbytes
        if not (chunks := self.balloon.coming()):
            return 0
        if keep := self._kept_for(demand):
            chunks = min(chunks, max(0, self.balloon.free_blocks - keep) // self._cache.chunk_blocks)
        return chunks * self._cache.freed_bytes

    def _could_later(self, demand: Demand) -> bool:
        """Whether the engine's thread, or the grower's, can give what this one cannot."""
        if self._coming(demand):
            return True
        if not self.balloon.in_use():
            return False
        if demand.rung == PAUSE:
            return self._goes_on()
        return self.mover is not None and self.mover.could(self._kept_for(demand))

    def _end(self, demand: Demand) -> None:
        if demand.rung == SHRINK and demand.nbytes > 0 and self.balloon.in_use():
            self._debt = max(self._debt, demand.nbytes)
            self._debt_until = max(self._debt_until, demand.deadline)
        demand.served.set()

    def _pay(self) -> None:
        """Gives what it owes, as far as it has come free. Who is still short asks again."""
        if time.monotonic() < self._debt_until:
            self._give(self._debt, self._needs().running)
        if time.monotonic() >= self._debt_until or not self.balloon.in_use():
            self._debt, self._debt_until = 0, 0.0

    def _give_to(self, demand: Demand) -> int:
        given = self._give(demand.nbytes, self._kept_for(demand))
        demand.nbytes -= given
        return given

    def _compact(self, demand: Demand) -> int:
        # What is not on the stream yet would come after the copies, and write to the old places.
        if self.mover is None or self._steps:
            return 0
        given = self.mover.give(demand.nbytes, self._kept_for(demand))
        demand.nbytes -= given
        self._debt = max(0, self._debt - given)
        return given

    def _kept_for(self, demand: Demand) -> int:
        """Blocks that requests are about to take: of those that wait too, unless admissions are the price."""
        if demand.rung == PAUSE:
            return 0
        needs = self._needs()
        return needs.most if demand.rung == EVICT else needs.running

    def _give(self, nbytes: int, keep: int) -> int:
        """Gives so many bytes, or what there is beside so many free blocks. What was to come goes first."""
        if nbytes <= 0:
            return 0
        self.grower.cancel()
        self.balloon.unpark(self.grower.take())
        most = max(0, self.balloon.free_blocks - keep) // self._cache.chunk_blocks if keep else None
        if most == 0:
            return 0
        found = self.balloon.cheapest(-(-nbytes // self._cache.freed_bytes) + 1)[:most]
        # Neighbours that go together free more than each of them alone, and a short last one less.
        enough = bisect_left(range(1, len(found)), nbytes, key=lambda n: self._cache.freed(found[:n]))
        chunks = found[: enough + 1]
        freed = self._cache.freed(chunks)
        if chunks:
            self.balloon.park(chunks)
            self._cache.release(chunks)
        self._debt = max(0, self._debt - freed)
        return freed
