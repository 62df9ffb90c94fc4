"""What vLLM's sleep and wake-up do to an engine's memory here.

vLLM's own way is an allocator of its own for weights and KV cache. Here the weights lie in a `Stowage`, and
the KV cache is the arena's in any case; vLLM's worker, executor and routes are as they were.
"""

from __future__ import annotations

import gc
import logging
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import torch
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

from torch_elastic_mem.errors import InUseError, OutOfMemory
from torch_elastic_mem.integrations.vllm import compat
from torch_elastic_mem.integrations.vllm.cache import close_later
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
        graphs: what CUDA graphs work in. It comes and goes with the weights, and nothing of it is lost.
        cache: the KV cache, once there is one.
    """

    def __init__(self, arena: Arena, account: Account) -> None:
        super().__init__()
        self.weights = Stowage(account, "weights")
        self.graphs = Stowage(account, "graphs")
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

    @contextmanager
    def loading(self) -> Iterator[None]:
        """The model is loaded within the block, and nothing else."""
        with self.weights.allocations(), self.capturing():
            yield

    def capturing(self) -> AbstractContextManager[None]:
        """Graphs are captured, or made ready to be, within the block."""
        return nullcontext() if self._pool is None else compat.capturing_into(self._pool)

    def close(self) -> None:
        """Gives back what nobody has any more. The model goes with who has it, and graphs do nothing more."""
        close_later(self.weights.close)
        if self._pool is None:
            close_later(self.graphs.close)
            return
        with suppress(InUseError):
            self.graphs.put_away(keep=False)

    def suspend(self, level: int = 1) -> None:
        """Gives the KV cache back, and the weights: at level 1 their bytes stay in host memory.

        Raises:
            InUseError: requests hold blocks, or a graph is captured. What was awake is awake.
        """
        # What torch has cached of a weight that has gone need not be kept.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        cache = self._cache(away=False)
        with ExitStack() as undo:
            if cache is not None:
                cache.put_away()
                undo.callback(cache.bring_back, WAKE)
            self.graphs.put_away(keep=True)
            undo.callback(self.graphs.bring_back, WAKE)
            self.weights.put_away(keep=level == 1)
            undo.pop_all()
        self._state = "SUSPENDED"
        self.cool_down()
        log.info("asleep at level %d: %r holds %d MiB", level, self._account, self._account.held >> 20)

    def resume(self, tags: Sequence[str] | None = None) -> None:
        """Brings back what is named, or all: the weights whole, of the cache what a first step takes.

        Raises:
            OutOfMemory: the memory is not to be had. What slept sleeps on.
        """
        cache = self._cache(away=True) if tags is None or "kv_cache" in tags else None
        weights = self.weights.away and (tags is None or "weights" in tags)
        wanted = 0 if cache is None else cache.bytes
        if weights:
            wanted += self.weights.bytes + self.graphs.bytes
        self._warm_up()
        try:
            # Leased together, so that one never waits with the other in its hands.
            lease = self._account.reserve(wanted, timeout=WAKE) if wanted else nullcontext()
            with lease, ExitStack() as undo:
                if cache is not None:
                    cache.bring_back(WAKE)
                    undo.callback(cache.put_away)
                if weights:
                    self.graphs.bring_back(WAKE)
                    undo.callback(self.graphs.put_away, keep=True)
                    self.weights.bring_back(WAKE)
                undo.pop_all()
        except OutOfMemory as reason:
            self.cool_down()
            raise OutOfMemory(f"the engine does not wake up, and sleeps on: {reason}") from None
        if not self.weights.away and self._cache(away=True) is None:
            self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        """Gives back what is named, and keeps none of it."""
        cache = self._cache(away=False)
        if "kv_cache" in tags and cache is not None:
            cache.put_away()
        if "weights" in tags:
            self.graphs.put_away(keep=True)
            self.weights.put_away(keep=False)
        self._state = "SUSPENDED"
        self.cool_down()

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
