"""The KV caches that serve the simulated engine: the elastic one, and a model of fixed compound pages."""

from __future__ import annotations

import heapq
import time

import torch_elastic_mem as tem


class ElasticCache:
    """An ElasticKVTensor behind its block pool, with every call timed."""

    def __init__(self, kv: tem.ElasticKVTensor, *, max_copies: int) -> None:
        self._kv = kv
        self._pool = tem.BlockPool(kv)
        self._max_copies = max_copies
        self.allocate_ns: list[int] = []
        self.free_ns: list[int] = []
        self.compact_ns: list[int] = []
        self.copied_blocks = 0
        self.refused = 0

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; tem.OutOfMemory when they are not to be had."""
        start = time.perf_counter_ns()
        try:
            blocks = self._pool.allocate(count)
        except tem.OutOfMemory:
            self.refused += 1
            raise
        self.allocate_ns.append(time.perf_counter_ns() - start)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Gives back blocks."""
        start = time.perf_counter_ns()
        self._pool.free(blocks)
        self.free_ns.append(time.perf_counter_ns() - start)

    def compact(self) -> dict[int, int]:
        """Carries out one plan of at most `max_copies` copies; returns where each moved block is now."""
        start = time.perf_counter_ns()
        plan = self._pool.plan_compaction(max_copies=self._max_copies)
        if plan.copies:
            self._kv.copy_blocks(plan.copies)
        plan.commit()
        self.compact_ns.append(time.perf_counter_ns() - start)
        self.copied_blocks += len(plan.copies)
        return dict(plan.copies)

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks now taken."""
        return self._kv.live_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of physical memory mapped behind the tensor."""
        return self._kv.resident_bytes


class CompoundPages:
    """What a system of one fixed page size would hold: a model, which maps nothing.

    Keys and values of each layer lie in a tensor of their own, so a block lives in one 2 MiB page of each of
    them, and those 2 x layers pages come and go together. Blocks are placed lowest address first, as the
    elastic pool's are: what differs is the granularity alone.
    """

    PAGE_BYTES = 2 << 20

    def __init__(self, capacity: int, block_bytes: int, layers: int) -> None:
        self._block_bytes = block_bytes
        self._compound_bytes = self.PAGE_BYTES * layers * 2
        self._blocks_per_page = self._compound_bytes // block_bytes
        pages = capacity // self._compound_bytes
        self._live_in_page = [0] * pages
        self._free = list(range(pages * self._blocks_per_page))
        self._live = 0
        self._mapped_pages = 0

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; tem.OutOfMemory when they are not to be had."""
        if count > len(self._free):
            raise tem.OutOfMemory(f"{count} blocks asked, {len(self._free)} free")
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            page = block // self._blocks_per_page
            if self._live_in_page[page] == 0:
                self._mapped_pages += 1
            self._live_in_page[page] += 1
        self._live += count
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Gives back blocks; a compound page goes with its last one."""
        for block in blocks:
            page = block // self._blocks_per_page
            self._live_in_page[page] -= 1
            if self._live_in_page[page] == 0:
                self._mapped_pages -= 1
            heapq.heappush(self._free, block)
        self._live -= len(blocks)

    def compact(self) -> dict[int, int]:
        """Fixed pages are not compacted."""
        return {}

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks now taken."""
        return self._live * self._block_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the compound pages that hold a live block."""
        return self._mapped_pages * self._compound_bytes
