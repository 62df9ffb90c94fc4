"""What vLLM's sleep and wake-up do to an engine's memory here.

vLLM's own way is an allocator of its own for weights, KV cache and, from 0.32 on, what its runner needs
beside them. Here each of these lies in a `Stowage`, but for the KV cache, which is the arena's in any case;
vLLM's worker, executor and routes are as they were.
"""

from __future__ import annotations

import gc
import logging
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import torch
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

from torch_elastic_mem.errors import InUseError, OutOfMemory
from torch_elastic_mem.integrations.vllm import compat_sleep
from torch_elastic_mem.integrations.vllm.registry import close_later
from torch_elastic_mem.stowage import Stowage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch_elastic_mem.account import Account
    from torch_elastic_mem.arena import Arena
    from torch_elastic_mem.integrations.vllm.cache import ElasticCache
    from torch_elastic_mem.integrations.vllm.memory import Resting

log = logging.getLogger("vllm.torch_elastic_mem")

# Seconds that others have to yield for a wake-up: time for a trainer's step and its spill.
WAKE = 30.0


class Sleep(SleepModeBackend):
    """One engine's. The engine's thread calls all of it, when no step is under way.

    Args:
        arena: where its memory is.
        account: whom it is charged to.

    Attributes:
        weights: what the model is loaded into.
        graphs: what CUDA graphs work in. It is back with whatever wakes first, and nothing of it is lost.
        runtime: the runner's state. As with graphs.
        scratch: what holds nothing from step to step. As with graphs, but its bytes are lost.
        cache: the KV cache, once there is one.
    """

    def __init__(self, arena: Arena, account: Account) -> None:
        super().__init__()
        self.weights = Stowage(account, "weights")
        self.graphs = Stowage(account, "graphs")
        self.runtime = Stowage(account, "state")
        self.scratch = Stowage(account, "scratch")
        self.cache: ElasticCache | None = None
        self._arena = arena
        self._account = account
        self._pool: tuple[int, int] | None = None  # torch's, of the graphs
        self._warm: int | None = None  # the reserve's upper mark, while it is lowered

    def keep_graphs(self) -> None:
        """Has the graphs that are captured within `capturing` work in memory that sleeps.

        Raises:
            TemError: torch's memory on the device is no account's.
        """
        self._pool = self.graphs.graph_pool()

    def allocations(self, tag: str) -> AbstractContextManager[None]:
        """What vLLM allocates under a tag of its own lies in what sleeps, within the block."""
        match tag:
            case "weights":
                return self._loading()
            case "runtime":
                return self.runtime.allocations()
            case "workspace":
                return self.scratch.allocations()
        return nullcontext()  # the KV cache is the arena's in any case

    @contextmanager
    def _loading(self) -> Iterator[None]:
        # First what imports a module of vLLM's: constants of those are no weights.
        with compat_sleep.lora_states_in(self.allocations), self.weights.allocations(), self.capturing():
            yield

    def capturing(self) -> AbstractContextManager[None]:
        """Graphs are captured, or made ready to be, within the block."""
        return nullcontext() if self._pool is None else compat_sleep.capturing_into(self._pool)

    @property
    def bytes(self) -> int:
        """Of all but the cache; while it sleeps, those that waking up takes."""
        return sum(stowage.bytes for stowage, _ in self._stowages())

    def close(self) -> None:
        """Gives back what nobody has any more, and what graphs work in, for they do nothing more.

        The model goes with who has it, and so does what backends keep for the engines to come.
        """
        if self._pool is not None:
            with suppress(InUseError):
                self.graphs.put_away(keep=False)
        for stowage, _ in self._stowages():
            if stowage is not self.graphs or self._pool is None:
                close_later(stowage.close)

    def suspend(self, level: int = 1) -> None:
        """Gives the KV cache back, and the weights: at level 1 their bytes stay in host memory.

        Where something does not go after all, and what went cannot come back, for somebody has its memory by
        then, the engine sleeps, as far as it does: it can be woken.

        Raises:
            InUseError: requests hold blocks, or a graph is captured. What was awake is awake.
        """
        # What torch has cached of a weight that has gone need not be kept.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            with ExitStack() as undo:
                self._give_back(level, undo)
                undo.pop_all()
        except OutOfMemory as refusal:  # what is brought back asks for memory, and nothing else does
            reason = refusal.__context__
            log.error("not all of the engine sleeps: %r; nor does all of it wake up: %s", reason, refusal)
        self._suspended()
        log.info("asleep at level %d: %r holds %d MiB", level, self._account, self._account.held >> 20)

    def _give_back(self, level: int, undo: ExitStack) -> None:
        stowages = [(stowage, keep) for stowage, keep in self._stowages(level) if not stowage.away]
        # What may well fail comes before what others take at once.
        for stowage, keep in stowages:
            if keep:
                undo.callback(stowage.drop)
                stowage.save()
        if (cache := self._cache(away=False)) is not None:
            cache.put_away()
            undo.callback(cache.bring_back, WAKE)
        for stowage, keep in stowages:
            stowage.put_away(keep=keep)
            undo.callback(stowage.bring_back, WAKE)

    def _suspended(self) -> None:
        self._state = "SUSPENDED"
        self._tell()
        self.cool_down()

    def _tell(self) -> None:
        if self.cache is not None and self.cache.resting is not None:
            self.cache.resting.weights_away = self.weights.away

    def resume(self, tags: Sequence[str] | None = None) -> None:
        """Brings back what is named, or all: the weights whole, of the cache what a first step takes.

        Raises:
            OutOfMemory: the memory is not to be had. What slept sleeps on.
        """
        cache = self._cache(away=True) if tags is None or "kv_cache" in tags else None
        stowages = [
            (stowage, keep)
            for stowage, keep in self._stowages()
            if stowage.away and (stowage is not self.weights or tags is None or "weights" in tags)
        ]
        wanted = sum(stowage.bytes for stowage, _ in stowages) + (0 if cache is None else cache.bytes)
        self._warm_up()
        try:
            # Leased together, so that one never waits with the other in its hands.
            lease = self._account.reserve(wanted, timeout=WAKE) if wanted else nullcontext()
            with lease, ExitStack() as undo:
                if cache is not None:
                    cache.bring_back(WAKE)
                    undo.callback(cache.put_away)
                for stowage, keep in stowages:
                    stowage.bring_back(WAKE)
                    undo.callback(stowage.put_away, keep=keep)
                undo.pop_all()
        except OutOfMemory as reason:
            self.cool_down()
            raise OutOfMemory(f"the engine does not wake up, and sleeps on: {reason}") from None
        self._tell()
        if not self.weights.away and self._cache(away=True) is None:
            self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        """Gives back what is named, and keeps none of it."""
        cache = self._cache(away=False)
        if "kv_cache" in tags and cache is not None:
            cache.put_away()
        if "weights" in tags:
            self.weights.put_away(keep=False)
        self._suspended()

    def _stowages(self, level: int = 1) -> list[tuple[Stowage, bool]]:
        """All of them, and whether their bytes are kept; the model, which is the largest, last."""
        return [(self.scratch, False), (self.graphs, True), (self.runtime, True), (self.weights, level == 1)]

    @classmethod
    def preserves_communicators(cls) -> bool:
        """Their memory is none of what sleeps."""
        return True

    def _cache(self, *, away: bool) -> Resting | None:
        """The KV cache, if it is there and is away or not, as asked."""
        resting = None if self.cache is None else self.cache.resting
        return resting if resting is not None and resting.away == away else None

    def cool_down(self) -> None:
        """The account's idle memory goes, and with the last of an arena's tenants its warm extents."""
        self._account.trim()
        state = self._arena.snapshot()
        if state.broker is None and state.leased == 0 and state.reserve_high > state.reserve_low:
            self._warm = state.reserve_high
            self._arena.set_reserve(state.reserve_low, state.reserve_low)

    def _warm_up(self) -> None:
        if self._warm is not None:
            self._arena.set_reserve(self._arena.snapshot().reserve_low, self._warm)
            self._warm = None
