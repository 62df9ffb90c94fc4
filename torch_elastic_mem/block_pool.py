"""Which blocks to hand out, and which to move, so that extents fill and empty together."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch_elastic_mem import _C
from torch_elastic_mem.elastic_kv import ElasticKVTensor
from torch_elastic_mem.errors import InvalidArgument


class Compaction:
    """Copies that empty extents, planned by `BlockPool.plan_compaction`. Ends with `commit()` or `abort()`.

    Between the plan and its end, sources and destinations are both held: requests go on reading and writing
    the sources until the copies are made. An engine copies between two steps, changes its block tables, and
    commits.

    Attributes:
        copies: (from, to) block numbers. No destination is a source.
        freed_bytes: what comes back when the sources have gone.
    """

    def __init__(self, kv: ElasticKVTensor, pool: _C.BlockPool, plan: _C.CompactionPlan) -> None:
        self._kv = kv
        self._pool = pool
        self._plan: _C.CompactionPlan | None = plan
        self.copies = plan.copies
        self.freed_bytes = plan.freed_bytes

    def __bool__(self) -> bool:
        return bool(self.copies)

    def _open_plan(self) -> _C.CompactionPlan:
        if self._plan is None:
            raise InvalidArgument("this compaction has been committed or aborted already")
        return self._plan

    def commit(self) -> None:
        """The copies are on the current stream: the sources go behind it.

        Raises:
            InvalidArgument: ended already. BlockError: a source has been freed since the plan; it can
                still be aborted.
        """
        self._pool.commit(self._open_plan(), self._kv.stream())
        self._plan = None

    def abort(self) -> None:
        """Nothing was copied: the destinations go.

        Raises:
            InvalidArgument: ended already.
        """
        self._pool.abort(self._open_plan(), self._kv.stream())
        self._plan = None


class BlockPool:
    """Hands out the blocks of a KV cache. Thread-safe.

    New blocks go to the fullest resident extent, at its lowest free address; where none has room, to the
    lowest address without memory. What empties is then at the top, and goes as a whole.

    Args:
        kv: the cache. Blocks held by its own `ensure()` are left alone.

    Raises:
        InUseError: the cache has another pool.
    """

    def __init__(self, kv: ElasticKVTensor) -> None:
        self._kv = kv
        self._core = _C.BlockPool(kv._core)

    @property
    def num_free(self) -> int:
        """Blocks that are not handed out, with or without memory."""
        return self._core.free_blocks

    @property
    def num_live(self) -> int:
        """Blocks that are handed out."""
        return self._core.live_blocks

    def allocate(self, n: int, *, timeout: float | None = None) -> list[int]:
        """Takes `n` blocks, resident. All or nothing.

        Args:
            n: how many, at least one.
            timeout: seconds to wait for others to yield; None: the arena's `yield_timeout`.

        Raises:
            OutOfMemory: not as many blocks are free, or there is no memory for them. Nothing was taken.
            InvalidArgument: `n` is not a positive integer.
        """
        count = _count(n, "n")
        return self._core.allocate(count, self._kv.stream(), self._kv.account.device.seconds(timeout))

    def free(self, blocks: Iterable[int]) -> None:
        """Gives blocks back behind the work on the current stream.

        Raises:
            BlockError: a block that this pool did not hand out, or named twice. Nothing was freed.
        """
        self._core.free(blocks, self._kv.stream())

    def cheapest(self) -> list[tuple[int, int, int, int]]:
        """Extents with live blocks, cheapest to empty first.

        Each as (first block, last block, live blocks, bytes that come back), both ends included. With
        blocks that do not divide extents, neighbours share one. Cheap is few live blocks for the bytes.
        """
        return self._core.cheapest()

    def plan_compaction(self, max_copies: int | None = None) -> Compaction:
        """Plans which blocks to copy where so that whole extents come free. Only resident blocks are filled.

        Args:
            max_copies: at most so many; None: as many as are worth it.

        Returns:
            The plan; false if there is nothing to gain.
        """
        most = self._kv.num_blocks if max_copies is None else _count(max_copies, "max_copies")
        plan = self._core.plan_compaction(most, self._kv.stream(), self._kv.account.device.seconds(None))
        return Compaction(self._kv, self._core, plan)


def _count(value: int, name: str) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if not 0 < count < 2**48:
        raise InvalidArgument(f"{name} is {value!r}; it is a positive integer")
    return count
