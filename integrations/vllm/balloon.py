"""Which of an engine's blocks its pool may use: pure bookkeeping over vLLM's own BlockPool.

Blocks without memory are *parked*: taken out of the pool as if a request held them. Admission, prefix
lookup, eviction and preemption stay vLLM's, and never meet one. Blocks are parked in chunks, the neighbours
that share extents.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, Protocol

from torch_elastic_mem.integrations.vllm import compat
from torch_elastic_mem.integrations.vllm.compaction import Chunk, Hole

# Blocks that are counted without a pause: a step that is to run waits for less than 0.1 ms.
AT_ONCE = 1024


class Pool(Protocol):
    """What of vLLM's `BlockPool` is used here."""

    blocks: list[Any]
    free_block_queue: Any

    def touch(self, blocks: Sequence[Any]) -> None:
        """Counts one more holder of each."""

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """Counts one holder of each less; who has none is free."""

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Forgets what is cached in them."""

    def get_num_free_blocks(self) -> int:
        """Those without a holder."""

    def get_cached_block(self, block_hash: Any, kv_cache_group_ids: list[int]) -> list[Any] | None:
        """In which block of each group this is kept; None if it is not in all of them."""

    def get_new_blocks(self, num_blocks: int) -> Any:
        """Hands some out."""


@dataclass(frozen=True, slots=True, order=True)
class Cost:
    """What giving up a chunk costs, cheapest first: cached blocks, then how late the last was used."""

    cached: int
    used: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Counts:
    """An engine's blocks, but for the null block; together they are all of them.

    Attributes:
        in_use: requests hold them.
        cached: no request does, and a prefix is kept in them.
        free: they have memory, and nothing is in them.
        parked: they have no memory.
    """

    in_use: int
    cached: int
    free: int
    parked: int


class Balloon:
    """The parked chunks of a pool. Not thread-safe: its owner's lock guards it and the pool.

    The chunk of block 0, vLLM's null block, is never parked.

    Args:
        pool: vLLM's.
        chunk_blocks: neighbouring blocks that are parked together.
        resident: how many of the first chunks have memory already.
        read: numbers of the blocks that are read though nobody need hold them.
        deferred: how many blocks come free with the steps in flight: who held them holds them no longer.
    """

    def __init__(
        self,
        pool: Pool,
        chunk_blocks: int,
        resident: int,
        read: Callable[[], Collection[int]] = tuple,
        deferred: Callable[[], int] = int,
    ) -> None:
        self._pool = pool
        self._size = chunk_blocks
        self._read = read
        self._deferred = deferred
        self.num_chunks = -(-len(pool.blocks) // chunk_blocks)
        self._out: set[int] = set()
        self.parked_blocks = 0
        self._counted = 0  # unused blocks when last counted
        self._taken = 0  # blocks that the pool has handed out since
        self._more = True  # there may be more of them than these two say
        self._watch(pool)
        self.park(range(max(resident, 1), self.num_chunks))

    @property
    def parked(self) -> int:
        """Chunks that are parked."""
        return len(self._out)

    def resident(self) -> list[int]:
        """Chunks that are not parked: those with memory."""
        return [chunk for chunk in range(self.num_chunks) if chunk not in self._out]

    def of(self, chunk: int) -> Sequence[Any]:
        """A chunk's blocks."""
        return self._pool.blocks[chunk * self._size : (chunk + 1) * self._size]

    def park(self, chunks: Iterable[int]) -> None:
        """Takes chunks that nobody uses out of the pool; what is cached in them is forgotten."""
        taken = list(chunks)
        self.forget(taken)
        blocks = [block for chunk in taken for block in self.of(chunk)]
        self._pool.touch(blocks)
        self._out.update(taken)
        self.parked_blocks += len(blocks)
        self._counted, self._more = 0, True

    def forget(self, chunks: Iterable[int]) -> None:
        """Forgets what is cached in these chunks."""
        blocks = (block for chunk in chunks for block in self.of(chunk))
        if cached := {block.block_id for block in blocks if block.block_hash is not None}:
            self._pool.evict_blocks(cached)

    def unpark(self, chunks: Iterable[int]) -> None:
        """Lets the pool have these chunks again; the lowest of their blocks are used first."""
        for chunk in sorted(chunks, reverse=True):
            blocks = self.of(chunk)
            self._out.remove(chunk)
            self.parked_blocks -= len(blocks)
            self._pool.free_blocks(blocks)

    def next_out(self, count: int, without: Iterable[int] = ()) -> list[int]:
        """The lowest parked chunks, so that the cache stays dense, but for those named."""
        return sorted(self._out.difference(without))[:count]

    def cheapest(self, count: int) -> list[int]:
        """Up to so many chunks that nobody uses: those that cost the prefix cache least.

        By chunk rather than by block: what is cached beside it goes with a block in any case.
        """
        read = self._read_chunks()
        free, cached, used = self._survey(count + len(read))
        costs = [
            Cost(cached[chunk], used[chunk], -chunk)
            for chunk in range(1, self.num_chunks)
            if free[chunk] and free[chunk] == len(self.of(chunk)) and chunk not in read
        ]
        return [-cost.chunk for cost in sorted(costs)[:count]]

    def coming(self) -> int:
        """Chunks that come free by themselves: those that are read yet, and what is deferred, at best."""
        read = sum(self.held(chunk) == [] for chunk in self._read_chunks())
        return read + -(-self._deferred() // self._size)

    def held_prefix(self, hashes: Iterable[Any]) -> int:
        """How many of the first of these, of a pool with one group, are in blocks that requests hold."""
        found = (self._pool.get_cached_block(each, [0]) for each in hashes)
        return sum(1 for _ in takewhile(lambda blocks: blocks and blocks[0].ref_cnt, found))

    def _read_chunks(self) -> set[int]:
        return {number // self._size for number in self._read()}

    def occupancy(self) -> list[Chunk]:
        """The chunks with memory, and what is free in them."""
        free, cached, _ = self._survey()
        return [
            Chunk(number, len(self.of(number)) - free[number], free[number], cached[number])
            for number in self.resident()
        ]

    def holes(self, without: Collection[int], cached: int) -> list[Hole]:
        """The free blocks that are not on these chunks: all that are empty, so many of the coldest others."""
        size = self._size
        found = []
        for place, block in enumerate(self._free()):
            warm = compat.hash_of(block) is not None
            if (warm and not cached) or (chunk := block.block_id // size) in without:
                continue
            cached -= warm
            found.append(Hole(place if warm else -1, chunk, block.block_id))
        return found

    def held(self, chunk: int) -> list[int] | None:
        """The blocks of a chunk that requests hold; None if vLLM has one of them for itself."""
        blocks = self.of(chunk)
        # One that is in no queue is in use even where nobody counts it, as sinks are.
        if any(each.is_null or (not each.ref_cnt and each.prev_free_block is None) for each in blocks):
            return None
        return [each.block_id for each in blocks if each.ref_cnt]

    def move(self, moves: Iterable[tuple[int, int]]) -> None:
        """Has whoever holds a block hold another instead, which nobody does; (from, to).

        What the prefix cache knows of it goes with it; what it knows of the other is forgotten.
        """
        for source, to in moves:
            self._pool.evict_blocks({to})
            compat.exchange(self._pool, source, to)
        self._more = True

    def _survey(self, empty: int | None = None) -> tuple[list[int], list[int], list[int]]:
        """By chunk: free blocks, those of them with something cached, how late the last of these was used.

        It looks at the free blocks alone, and at none that is cached if so many chunks are empty already:
        vLLM keeps the cached ones behind the others.
        """
        size, found = self._size, 0
        free, cached, used = ([start] * self.num_chunks for start in (0, 0, -1))
        for place, block in enumerate(self._free()):
            chunk = block.block_id // size
            if compat.hash_of(block) is not None:
                if empty is not None and found >= empty:
                    break
                cached[chunk] += 1
                used[chunk] = place
            free[chunk] += 1
            found += free[chunk] == size and not cached[chunk]
        return free, cached, used

    def _free(self) -> Iterator[Any]:
        """The blocks that nobody holds, those first that were used longest ago."""
        block = self._pool.free_block_queue.fake_free_list_head.next_free_block
        while (after := block.next_free_block) is not None:
            yield block
            block = after

    @property
    def free_blocks(self) -> int:
        """Those that the pool can hand out: unused, and cached without a holder."""
        return self._pool.get_num_free_blocks()

    def unused(self, most: int) -> int:
        """Free blocks with nothing cached in them, counted up to `most` or so. vLLM hands these out first.

        They are counted anew only when those that were there may have been handed out, and others may have
        come: a step costs a subtraction, as a rule, in an engine that is short of memory too.
        """
        if self._more and self._counted - self._taken < most:
            self._counted, self._taken = self._count(4 * most), 0
            self._more = self._counted >= 4 * most
        return max(0, self._counted - self._taken)

    def _count(self, most: int) -> int:
        unused = takewhile(lambda block: compat.hash_of(block) is None, self._free())
        return sum(1 for _ in islice(unused, most))

    def _watch(self, pool: Any) -> None:
        hand_out, free = pool.get_new_blocks, pool.free_blocks

        def get_new_blocks(count: int) -> Any:
            self._taken += count
            return hand_out(count)

        def free_blocks(blocks: Iterable[Any]) -> None:
            self._more = True
            free(blocks)

        pool.get_new_blocks, pool.free_blocks = get_new_blocks, free_blocks

    def counts(self, between: Callable[[], object] = lambda: None) -> Counts:
        """How many blocks are in what state: looks at each of them.

        Where the owner's lock is not held they may be a few blocks off.

        Args:
            between: called between some of them and the next, so that others may run.
        """
        in_use, parked = self.in_use(), self.parked_blocks
        blocks, cached = self._pool.blocks, 0
        for start in range(0, len(blocks), AT_ONCE):
            some = blocks[start : start + AT_ONCE]
            cached += sum(not block.ref_cnt and compat.hash_of(block) is not None for block in some)
            between()
        return Counts(in_use, cached, max(0, len(blocks) - 1 - in_use - cached - parked), parked)

    def in_use(self) -> int:
        """Blocks that requests hold, without the null block."""
        return len(self._pool.blocks) - 1 - self._pool.get_num_free_blocks() - self.parked_blocks
