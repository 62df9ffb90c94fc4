"""A range of blocks against a model: what is held, what is resident, what the account is charged for."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import torch_elastic_mem as tem
from torch_elastic_mem import _C

pytestmark = pytest.mark.core

BLOCKS = 24
GRANULES = 40  # of the arena's capacity
G = 2 << 20
BLOCK_BYTES = [G // 4, G // 3 + 1, G, G + G // 2, 3 * G + 5]
SETS = st.sets(st.integers(0, BLOCKS - 1), min_size=1, max_size=8)


class Residency(RuleBasedStateMachine):
    @initialize(
        block_bytes=st.sampled_from(BLOCK_BYTES),
        stripes=st.sampled_from([1, 3]),
        keep=st.sampled_from([0, 3 * G, 1 << 40]),
        single=st.booleans(),
    )
    def open(self, block_bytes: int, stripes: int, keep: int, single: bool) -> None:
        self.block_bytes, self.stripes, self.keep = block_bytes, stripes, keep
        self.arena = tem.Arena("host", capacity=GRANULES * G)
        assert self.arena.granularity == G
        self.account = self.arena.account("tenant")
        self.rival = self.arena.account("rival", "critical")
        # With extents of one granule the bytes are known exactly; otherwise the arena chooses them.
        self.exact = single
        self.range = _C.BlockRange(
            *(self.account._core, "the range", BLOCKS, block_bytes),
            stripes=stripes,
            keep=keep,
            extent_bytes=G if single else 0,
        )
        self.rival_range = _C.BlockRange(self.rival._core, "the rival", GRANULES, G)
        self.streams = [_C.host_stream_create() for _ in range(2)]
        self.submitted = [False, False]
        self.held: set[int] = set()
        self.fenced: dict[int, set[int]] = {}  # released blocks, by the streams that may still touch them
        self.tags: dict[int, int] = {}  # what was written to held blocks

    # The model.
    def granules(self, blocks: set[int]) -> set[int]:
        spans = ((b * self.block_bytes // G, ((b + 1) * self.block_bytes - 1) // G) for b in blocks)
        return {granule for first, last in spans for granule in range(first, last + 1)}

    def idle(self) -> int:
        accounts = self.arena.snapshot().accounts
        return next(account.idle for account in accounts if account.name == "tenant")

    def ends(self, block: int) -> list[int]:
        begins = [self.range.base(stripe) + block * self.block_bytes for stripe in range(self.stripes)]
        return [at for begin in begins for at in (begin, begin + self.block_bytes - 4)]

    def write(self, block: int) -> None:
        self.tags[block] = len(self.tags) * 1000 + block + 1
        for at in self.ends(block):
            ctypes.c_uint32.from_address(at).value = self.tags[block]

    # What is done to it.
    @rule(blocks=SETS, stream=st.integers(0, 1))
    def ensure(self, blocks: set[int], stream: int) -> None:
        try:
            self.range.ensure(blocks, self.streams[stream], 0.0)
        except tem.OutOfMemory:
            # Refused only where it could not fit beside what cannot go.
            stay = self.granules(self.held | blocks | set(self.fenced))
            rival = self.rival.held
            assert not self.exact or len(stay) * G * self.stripes + rival > GRANULES * G
            return
        for block in blocks - self.held:
            self.write(block)
        self.held |= blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data(), stream=st.integers(0, 1))
    def release(self, data: st.DataObject, stream: int) -> None:
        blocks = data.draw(st.sets(st.sampled_from(sorted(self.held)), min_size=1))
        self.range.release(blocks, self.streams[stream])
        self.held -= blocks
        if self.submitted[stream]:
            for block in blocks:
                self.fenced.setdefault(block, set()).add(stream)

    @rule(wrong=st.one_of(st.integers(-3, -1), st.integers(BLOCKS, BLOCKS + 2)), blocks=SETS)
    def a_block_out_of_range_changes_nothing(self, wrong: int, blocks: set[int]) -> None:
        for call in (self.range.ensure, lambda *a: self.range.release(a[0], a[1])):
            with pytest.raises(tem.BlockError, match=str(wrong)):
                call([*(blocks & self.held), wrong], self.streams[0], 0.0)

    @rule(blocks=SETS)
    def a_release_of_what_is_not_held_or_twice_changes_nothing(self, blocks: set[int]) -> None:
        if blocks - self.held:
            with pytest.raises(tem.BlockError):
                self.range.release(sorted(blocks & self.held) + sorted(blocks - self.held), 0)
        elif blocks:
            with pytest.raises(tem.BlockError):
                self.range.release([*sorted(blocks), min(blocks)], 0)

    @rule(stream=st.integers(0, 1))
    def submit(self, stream: int) -> None:
        _C.host_stream_submit(self.streams[stream])
        self.submitted[stream] = True

    @rule(stream=st.integers(0, 1))
    def complete(self, stream: int) -> None:
        _C.host_stream_complete(self.streams[stream])
        self.submitted[stream] = False
        self.fenced = {b: rest for b, on in self.fenced.items() if (rest := on - {stream})}

    @rule()
    def trim(self) -> None:
        self.account.trim()
        if not self.fenced:
            assert self.idle() == 0
            if self.exact:
                assert self.account.held == len(self.granules(self.held)) * G * self.stripes

    @rule(count=st.integers(1, GRANULES))
    def a_higher_class_takes_what_is_idle(self, count: int) -> None:
        free = GRANULES * G - self.account.held - self.rival.held
        idle = 0 if self.fenced else self.idle()
        try:
            self.rival_range.ensure(range(count), 0, 0.0)
        except tem.OutOfMemory:
            assert count * G - self.rival.held > free + idle
            return
        self.rival_range.release(range(count), 0)

    # What must hold.
    @invariant()
    def held_blocks_are_resident_and_counted(self) -> None:
        if not hasattr(self, "range"):
            return
        assert self.range.held_blocks == len(self.held)
        assert {block for block in range(BLOCKS) if self.range.held(block)} == self.held
        assert all(self.range.resident(block) for block in self.held)

    @invariant()
    def the_account_is_charged_for_what_is_resident(self) -> None:
        if not hasattr(self, "range"):
            return
        self.arena.collect()
        resident = self.range.resident_bytes
        assert self.account.held == resident
        assert resident % (G * self.stripes) == 0
        assert resident >= len(self.granules(self.held)) * G * self.stripes
        if not self.fenced:
            assert self.idle() <= self.keep
            if self.exact and self.keep == 0:
                assert resident == len(self.granules(self.held)) * G * self.stripes

    @invariant()
    def nothing_goes_before_its_fence(self) -> None:
        if hasattr(self, "range"):
            assert all(self.range.resident(block) for block in self.fenced)

    @invariant()
    def held_blocks_keep_their_contents(self) -> None:
        for block in getattr(self, "held", ()):
            for at in self.ends(block):
                assert ctypes.c_uint32.from_address(at).value == self.tags[block], block

    def teardown(self) -> None:
        if not hasattr(self, "range"):
            return
        self.range.close()
        for stream in self.streams:
            _C.host_stream_complete(stream)
        self.rival_range.close()
        self.arena.collect()
        self.account.close()
        self.rival.close()
        assert self.arena.snapshot().created == 0
        self.arena.close()
        for stream in self.streams:
            _C.host_stream_destroy(stream)


TestResidency = Residency.TestCase
TestResidency.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
