"""Empties sparse chunks of an engine's cache by moving what running requests have there."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch_elastic_mem.integrations.vllm.balloon import Balloon
from torch_elastic_mem.integrations.vllm.cache import BlockTables, ElasticCache
from torch_elastic_mem.integrations.vllm.compaction import Plan, plan


class Mover:
    """One engine's. Not thread-safe: the lock that guards the balloon guards it.

    Args:
        cache: the memory.
        balloon: the pool's blocks.
        tables: the block tables of the requests that hold one of the blocks named.
        stepping: whether a step is to come, before which blocks can move.

    Attributes:
        moved: blocks, until now.
    """

    def __init__(
        self,
        cache: ElasticCache,
        balloon: Balloon,
        tables: Callable[[Collection[int]], BlockTables],
        stepping: Callable[[], bool],
    ) -> None:
        self._cache = cache
        self._balloon = balloon
        self._tables = tables
        self._stepping = stepping
        self.moved = 0

    def could(self, keep: int) -> bool:
        """Whether a step is to come before which a chunk can be emptied, but for those that must stay."""
        return self._stepping() and self._room(keep)

    def give(self, nbytes: int, keep: int) -> int:
        """Gives up so many bytes, or what there is beside `keep` free blocks; returns how many.

        The engine's thread calls it, before it schedules. The copies are on its stream behind all the steps
        that use the old places, and before those that use the new; so is what the memory waits for.
        """
        if not self._room(keep):
            return 0
        found = self._plan(nbytes, keep)
        if not found.freed:
            return 0
        self._balloon.move(found.moves)
        self.moved += len(found.moves)
        self._cache.copy(found.moves)
        self._cache.on_moved(self._tables({block for _, block in found.moves}))
        self._balloon.park(found.freed)
        given = self._cache.freed(found.freed)
        self._cache.release(found.freed)
        return given

    def _room(self, keep: int) -> bool:
        """Whether all that could be on a chunk finds a place on others: free blocks are on chunks in use."""
        return self._balloon.free_blocks - keep >= self._cache.chunk_blocks

    def _plan(self, nbytes: int, keep: int) -> Plan:
        def held(chunk: int) -> list[int] | None:
            return self._balloon.held(chunk) if self._cache.freed([chunk]) else None

        return plan(self._balloon, held, -(-nbytes // self._cache.freed_bytes), keep)
