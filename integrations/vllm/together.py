"""Sleep and wake-up of an engine of several ranks: of all of them, or of none.

The scheduler's process puts the cache away and brings it back, for it orders the memory of all ranks. The
weights are each rank's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch_elastic_mem.errors import InUseError, OutOfMemory
from torch_elastic_mem.integrations.vllm.sleep import WAKE

if TYPE_CHECKING:
    from torch_elastic_mem.integrations.vllm.memory import Resting
    from torch_elastic_mem.integrations.vllm.ranks import Ranks

log = logging.getLogger("vllm.torch_elastic_mem")

# Has every rank's worker do something, by name: why each did not, or None.
Ask = Callable[..., "Sequence[str | None]"]


def attempt(worker: Any, method: str, *args: object) -> str | None:
    """Why a rank's worker did not do something; None if it did.

    An error would go on to vLLM's executor, which then leaves the answers of the other ranks unread, and
    takes them for those to its next call.
    """
    try:
        getattr(worker, method)(*args)
    except Exception as reason:
        log.exception("this rank does not %s", method)
        return str(reason) or repr(reason)
    return None


class Together:
    """What vLLM's executor has all workers do, by the same names. The engine's thread calls it.

    Args:
        ranks: their memory.
        ask: has their workers do something.
    """

    def __init__(self, ranks: Ranks, ask: Ask) -> None:
        self._ranks = ranks
        self._ask = ask
        self._level = 0  # at which the weights sleep; 0: they are awake

    def sleep(self, level: int = 1) -> None:
        """Gives the KV cache back, then the weights.

        Where a rank does not fall asleep and another cannot wake up again, for somebody has its memory by
        then, the engine sleeps, as far as it does: it can be woken.

        Raises:
            InUseError: requests hold blocks, or a rank does not fall asleep. What was awake is awake.
        """
        cache = self._put_away()
        if refusal := self._refusal("sleep", level):
            if stuck := self._refusal("wake_up", None):
                log.error("not all of the engine sleeps: %s; nor does all of it wake up: %s", refusal, stuck)
                self._level = level
                self._tell(weights_away=True)
                return
            if cache is not None:
                cache.bring_back(WAKE)
            lost = "; other ranks have lost their weights by then: load them again" if level == 2 else ""
            raise InUseError(f"no rank falls asleep: {refusal}{lost}")
        self._level = level
        self._tell(weights_away=True)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Brings back what is named, or all.

        Raises:
            OutOfMemory: a rank cannot have its memory. What slept sleeps on.
        """
        cache = self._cache(away=True) if tags is None or "kv_cache" in tags else None
        refusal = None
        if cache is not None:
            try:
                cache.bring_back(WAKE)
            except OutOfMemory as reason:
                refusal = str(reason)
        if refusal is None and (refusal := self._refusal("wake_up", tags)):
            if self._level:
                self._ask("sleep", self._level)
            if cache is not None:
                self._put_away()
        if refusal is not None:
            self._ranks.settle()
            self._ask("cool_down_elastic_account")
            raise OutOfMemory(f"the engine does not wake up, and sleeps on: {refusal}")
        if tags is None or "weights" in tags:
            self._level = 0
            self._tell(weights_away=False)

    def discard(self, tags: tuple[str, ...]) -> None:
        """Gives back what is named, and keeps none of it.

        Raises:
            InUseError: requests hold blocks, or a rank does not give it back.
        """
        if "kv_cache" in tags:
            self._put_away()
        if refusal := self._refusal("discard", tags):
            raise InUseError(f"not all ranks give back what is not wanted: {refusal}")
        if "weights" in tags:
            self._tell(weights_away=True)

    def _tell(self, *, weights_away: bool) -> None:
        if self._ranks.resting is not None:
            self._ranks.resting.weights_away = weights_away

    def _refusal(self, method: str, argument: object) -> str | None:
        """Why the first rank that did not do it did not."""
        refusals = self._ask(method, argument)
        return next((f"rank {rank}: {why}" for rank, why in enumerate(refusals) if why is not None), None)

    def _put_away(self) -> Resting | None:
        """The cache of all ranks; None if it was away, or there is none."""
        cache = self._cache(away=False)
        if cache is not None:
            cache.put_away()
            self._ranks.settle()
        return cache

    def _cache(self, *, away: bool) -> Resting | None:
        """The KV cache, if it is there and is away or not, as asked."""
        resting = self._ranks.resting
        return resting if resting is not None and resting.away == away else None
