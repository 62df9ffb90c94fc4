"""A balloon and vLLM's pool against a model: whose each block is."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.vllm.pools import cached, fill, free_ids, pool_of, unhashed_first
from torch_elastic_mem.integrations.vllm.balloon import Balloon

COUNTS = st.integers(1, 6)


class Breathing(RuleBasedStateMachine):
    @initialize(blocks=st.integers(2, 30), size=st.integers(1, 5), resident=st.integers(0, 8))
    def open(self, blocks: int, size: int, resident: int) -> None:
        self.pool = pool_of(blocks)
        self.balloon = Balloon(self.pool, size, resident)
        self.requests: list[list[Any]] = []
        self.parked = set(range(max(resident, 1), self.balloon.num_chunks))
        self.contents = 0

    def held(self) -> list[int]:
        return [block.block_id for request in self.requests for block in request]

    def blocks_of(self, chunks: set[int]) -> set[int]:
        return {block.block_id for chunk in chunks for block in self.balloon.of(chunk)}

    @rule(count=COUNTS)
    def allocate(self, count: int) -> None:
        count = min(count, self.pool.get_num_free_blocks())
        got = self.pool.get_new_blocks(count)
        assert not {block.block_id for block in got} & self.blocks_of(self.parked)
        self.requests.append(got)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0), filled=st.integers(0, 6))
    def finish(self, which: int, filled: int) -> None:
        """A request goes, having filled the first of its blocks."""
        request = self.requests.pop(which % len(self.requests))
        for block in request[:filled]:
            if block.block_hash is None:
                self.contents += 1
                fill(self.pool, block, self.contents)
        self.pool.free_blocks(reversed(request))

    @rule(which=st.integers(0))
    def hit(self, which: int) -> None:
        """A request finds a block in the prefix cache, whether another holds it or none."""
        found = [block for block in self.pool.blocks if block.block_hash is not None]
        if found:
            block = found[which % len(found)]
            self.pool.touch([block])
            self.requests.append([block])

    @rule(count=COUNTS)
    def give(self, count: int) -> None:
        chunks = self.balloon.cheapest(count)
        usable = set(range(1, self.balloon.num_chunks)) - self.parked
        idle = {chunk for chunk in usable if not self.blocks_of({chunk}) & set(self.held())}
        assert len(chunks) == min(count, len(idle)) and set(chunks) <= idle
        costs = {chunk: sum(b.block_hash is not None for b in self.balloon.of(chunk)) for chunk in idle}
        assert [costs[chunk] for chunk in chunks] == sorted(costs.values())[:count]
        self.balloon.park(chunks)
        self.parked |= set(chunks)

    @rule(count=COUNTS)
    def grow(self, count: int) -> None:
        chunks = self.balloon.next_out(count)
        assert chunks == sorted(self.parked)[:count]
        self.balloon.unpark(chunks)
        self.parked -= set(chunks)

    @rule(most=st.integers(0, 12))
    def unused(self, most: int) -> None:
        found, there = self.balloon.unused(most), unhashed_first(self.pool)
        assert found <= there
        assert found >= min(most, there)

    @invariant()
    def a_block_is_null_or_parked_or_free_or_in_use(self) -> None:
        parked, free, held = self.blocks_of(self.parked), free_ids(self.pool), set(self.held())
        assert sorted([0, *parked, *free, *held]) == [block.block_id for block in self.pool.blocks]
        assert self.pool.get_num_free_blocks() == len(free)
        assert (self.balloon.parked, self.balloon.parked_blocks) == (len(self.parked), len(parked))
        assert self.balloon.in_use() == len(held)
        for block in self.pool.blocks[1:]:
            expected = 1 if block.block_id in parked else self.held().count(block.block_id)
            assert block.ref_cnt == expected

    @invariant()
    def what_is_found_in_the_prefix_cache_is_not_parked(self) -> None:
        assert all(self.pool.blocks[block].block_hash is None for block in self.blocks_of(self.parked))
        found = sum(cached(self.pool, content) for content in range(1, self.contents + 1))
        assert found == sum(block.block_hash is not None for block in self.pool.blocks)


TestBreathing = Breathing.TestCase
TestBreathing.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
