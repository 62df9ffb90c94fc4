"""What vLLM's sleep and wake-up do to an engine's memory here.

vLLM's own way is an allocator of its own for weights and KV cache. Here the weights lie in a `Stowage`, and
the KV cache is the arena's in any case; vLLM's worker, executor and routes are as they were.
"""

from __future__ import annotations

import gc
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

from torch_elastic_mem.errors import OutOfMemory
from torch_elastic_mem.stowage import Stowage

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        cache: the KV cache, once there is one.
    """

    def __init__(self, arena: Arena, account: Account) -> None:
        super().__init__()
        self.weights = Stowage(account, "weights")
        self.cache: ElasticCache | None = None
        self._arena = arena
        self._account = account
        self._warm: int | None = None  # the reserve's upper mark, while it is lowered

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
        if cache is not None:
            cache.put_away()
        try:
            self.weights.put_away(keep=level == 1)
        except BaseException:
            if cache is not None:
                cache.bring_back(WAKE)
            raise
        self._state = "SUSPENDED"
        self.cool_down()
        log.info("asleep at level %d: %r holds %d MiB", level, self._account, self._account.held >> 20)

    def resume(self, tags: Sequence[str] | None = None) -> None:
        """Brings back what is named, or all: the weights whole, of the cache what a first step takes.

        Raises:
            OutOfMemory: the memory is not to be had. What slept sleeps on.
        """
        cache = self._cache(away=True) if tags is None or "kv_cache" in tags else None
        weights = self.weights if self.weights.away and (tags is None or "weights" in tags) else None
        wanted = (0 if cache is None else cache.bytes) + (0 if weights is None else weights.bytes)
        self._warm_up()
        try:
            # Leased together, so that one never waits with the other in its hands.
            with self._account.reserve(wanted, timeout=WAKE) if wanted else nullcontext():
                if cache is not None:
                    cache.bring_back(WAKE)
                try:
                    if weights is not None:
                        weights.bring_back(WAKE)
                except BaseException:
                    if cache is not None:
                        cache.put_away()
                    raise
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
