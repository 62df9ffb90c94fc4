"""A block pool against a model: who owns which block, what is written in it, and where blocks are put."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import torch_elastic_mem as tem

pytestmark = pytest.mark.core

BLOCKS = 30
G = 2 << 20
WORDS = {"half": G // 8, "quarter": G // 16, "third": G // 12 + 1, "long": 3 * G // 8}  # int32 in a block


class Pool(RuleBasedStateMachine):
    @initialize(
        size=st.sampled_from(sorted(WORDS)),
        layout=st.sampled_from(["block", "layer"]),
        capacity=st.sampled_from([12, 60]),
    )
    def open(self, size: str, layout: str, capacity: int) -> None:
        self.arena = tem.Arena("host", capacity=capacity * G)
        self.account = self.arena.account("serving")
        layers = 2 if layout == "layer" else None
        self.kv = tem.ElasticKVTensor(
            self.account, BLOCKS, (WORDS[size],), torch.int32, layers=layers, layout=layout
        )
        self.pool = tem.BlockPool(self.kv)
        self.divides = size in ("half", "quarter")
        self.extent_bytes = G * (layers or 1)
        self.tags: dict[int, int] = {}  # what every live block is filled with
        self.outside: set[int] = set()  # held by ensure(), not by the pool
        self.next_tag = 1

    # The model.
    def ends(self, block: int) -> list[torch.Tensor]:
        return [tensor[block, at] for tensor in self.kv.tensors for at in (0, tensor.shape[1] // 2, -1)]

    def fill(self, block: int) -> None:
        self.tags[block] = self.next_tag
        self.next_tag += 1
        for word in self.ends(block):
            word.fill_(self.tags[block])

    def free_sites(self) -> list[tuple[int, int]]:
        """Extents with room, fullest first, then lowest: (blocks free, the lowest of them)."""
        taken = self.tags.keys() | self.outside
        free = [
            [block for block in range(first, last + 1) if block not in taken]
            for first, last, _, _ in self.pool.cheapest()
        ]
        return sorted((len(blocks), blocks[0]) for blocks in free if blocks)

    # What is done to it.
    @rule(count=st.integers(1, 12))
    def allocate(self, count: int) -> None:
        before = self.kv.resident_bytes, set(self.tags)
        try:
            blocks = self.pool.allocate(count, timeout=0)
        except tem.OutOfMemory:
            assert (self.kv.resident_bytes, set(self.tags)) == before
            return
        assert len(set(blocks)) == count
        assert not set(blocks) & (self.tags.keys() | self.outside), "handed out twice"
        for block in blocks:
            self.fill(block)

    @rule()
    def one_block_goes_to_the_fullest_extent_or_the_lowest_address(self) -> None:
        sites = self.free_sites()
        lowest = min(set(range(BLOCKS)) - self.tags.keys() - self.outside, default=None)
        try:
            (block,) = self.pool.allocate(1, timeout=0)
        except tem.OutOfMemory:
            assert lowest is None or not sites or not self.divides
            return
        self.fill(block)
        if self.divides:  # where a block touches two extents, the one beside it decides as well
            assert block == (sites[0][1] if sites else lowest)

    @rule(count=st.integers(BLOCKS + 1, 2 * BLOCKS))
    def more_blocks_than_there_are_is_refused(self, count: int) -> None:
        with pytest.raises(tem.OutOfMemory, match=f"{count} blocks asked for"):
            self.pool.allocate(count)

    @precondition(lambda self: self.tags)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sets(st.sampled_from(sorted(self.tags)), min_size=1))
        self.pool.free(blocks)
        for block in blocks:
            del self.tags[block]

    @rule(blocks=st.sets(st.integers(0, BLOCKS - 1), min_size=1, max_size=3))
    def a_free_of_what_is_not_live_changes_nothing(self, blocks: set[int]) -> None:
        if blocks - self.tags.keys():
            with pytest.raises(tem.BlockError):
                self.pool.free(blocks)

    @rule(block=st.integers(0, BLOCKS - 1))
    def hold_outside_of_the_pool(self, block: int) -> None:
        if block in self.tags or len(self.outside) >= 2:
            return
        try:
            self.kv.ensure([block], timeout=0)
        except tem.OutOfMemory:
            return
        self.outside.add(block)

    @precondition(lambda self: self.outside)
    @rule()
    def let_go_outside_of_the_pool(self) -> None:
        self.kv.release([self.outside.pop()])

    @rule(most=st.one_of(st.none(), st.integers(1, 8)), commit=st.booleans())
    def compact(self, most: int | None, commit: bool) -> None:
        resident, live = self.kv.resident_bytes, set(self.tags)
        plan = self.pool.plan_compaction(max_copies=most)
        sources, targets = {a for a, _ in plan.copies}, {b for _, b in plan.copies}
        assert sources <= live
        assert not targets & (live | self.outside)
        assert len(sources) == len(targets) == len(plan.copies) <= (most or BLOCKS)
        assert self.kv.resident_bytes == resident, "only resident blocks are filled"
        assert bool(plan) == (plan.freed_bytes > 0)
        if not commit:
            plan.abort()
            assert self.kv.resident_bytes == resident
            return
        self.kv.copy_blocks(plan.copies)
        plan.commit()
        for source, target in plan.copies:
            self.tags[target] = self.tags.pop(source)
        assert self.kv.resident_bytes == resident - plan.freed_bytes
        with pytest.raises(tem.InvalidArgument):
            plan.abort()

    @rule()
    def compaction_leaves_nothing_to_gain(self) -> None:
        if not self.divides or self.outside:
            return
        for _ in range(BLOCKS):
            plan = self.pool.plan_compaction()
            if not plan:
                break
            self.kv.copy_blocks(plan.copies)
            plan.commit()
            for source, target in plan.copies:
                self.tags[target] = self.tags.pop(source)
        # Where all extents are equal: the fewest that hold so many blocks.
        sizes = {site[3] for site in self.pool.cheapest()}
        if sizes == {self.extent_bytes}:
            a_block = self.kv.block_bytes
            fewest = -(-len(self.tags) * a_block // self.extent_bytes)
            assert self.kv.resident_bytes == fewest * self.extent_bytes

    # What must hold.
    @invariant()
    def live_blocks_hold_what_was_written(self) -> None:
        for block, tag in getattr(self, "tags", {}).items():
            assert all(int(word) == tag for word in self.ends(block)), block

    @invariant()
    def the_counts_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.num_live == len(self.tags)
        assert self.pool.num_free == BLOCKS - len(self.tags)
        assert self.kv.live_bytes == (len(self.tags) + len(self.outside)) * self.kv.block_bytes
        assert self.account.held == self.kv.resident_bytes
        assert sum(site[3] for site in self.pool.cheapest()) == self.kv.resident_bytes

    @invariant()
    def extents_are_told_cheapest_first(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = self.tags.keys() | self.outside
        costs = []
        for first, last, live, nbytes in self.pool.cheapest():
            assert live == len(held & set(range(first, last + 1)))
            costs.append(live / nbytes)
        assert costs == sorted(costs)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.free(list(self.tags))
        self.kv.release(list(self.outside))
        assert self.account.held == 0
        self.kv.close()
        self.account.close()
        self.arena.close()


TestPool = Pool.TestCase
TestPool.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
