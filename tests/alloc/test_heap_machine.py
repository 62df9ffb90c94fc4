"""An account's malloc with streams, pools and checkpoints against a model: whose bytes, and until when."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import torch_elastic_mem as tem
from tests.alloc.mirror import SHARED, G, KiB, MiB, Mirror, Piece, PoolId, rounded
from torch_elastic_mem import _C

pytestmark = pytest.mark.core

CAPACITY = 48 * G
EVER = 1 << 64
STREAMS = st.integers(0, 2)
# What a rule draws must not depend on the state, for that hangs on when the arena's thread comes by: a rule
# that picks among what there is takes a number, and does nothing if there is nothing.
PICKS = st.integers(0, 255)
SIZES = st.one_of(
    st.integers(0, 32 * KiB),
    st.integers(32 * KiB, MiB),
    st.sampled_from([512, 4 * KiB, 64 * KiB, MiB, MiB + 1, G - 1, G, G + 1]),
    st.integers(MiB, 5 * MiB),
)


def picked(items: list[Any], pick: int) -> Any:
    return items[pick % len(items)]


@dataclass
class Block:
    """A live block."""

    piece: Piece
    tag: int = 0
    others: set[int] = field(default_factory=set)


@dataclass
class Behind:
    """Freed bytes and how far each stream must come until nothing touches them."""

    piece: Piece
    own: int  # what must be completed of its own stream
    others: dict[int, int]


class Heap(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.arena = tem.Arena("host", capacity=CAPACITY)
        self.account = self.arena.account("training")
        self.rival = self.arena.account("serving", "serving")
        self.wanted = _C.BlockRange(self.rival._core, "what serving wants", CAPACITY // G, G)
        self.heap = _C.Allocator(self.account._core, "training")
        self.mirror = Mirror(_C.MallocRecorder(self.heap))
        self.streams = [0, _C.host_stream_create(), _C.host_stream_create()]
        self.submitted, self.completed = dict.fromkeys(self.streams, 0), dict.fromkeys(self.streams, 0)
        self.live: dict[int, Block] = {}
        self.gone: list[Piece] = []
        self.tags = 0
        self.behind: list[Behind] = []
        self.uses: dict[PoolId, int] = {}
        self.released: dict[PoolId, dict[int, int]] = {}  # what was submitted before
        self.begun: list[tuple[PoolId, set[int]]] = []
        self.checkpoints: list[tuple[PoolId, list[_C._Placed], dict[int, int]]] = []
        self.limit = EVER

    # The model.
    def passed(self, stream: int, count: int) -> bool:
        return self.completed[stream] >= count

    def quiet(self) -> bool:
        """Nothing runs and nothing is captured: what is free is free for everybody."""
        return self.submitted == self.completed and not self.begun

    def pool_for(self, stream: int) -> PoolId:
        return next((pool for pool, streams in reversed(self.begun) if stream in streams), SHARED)

    def is_private(self, pool: PoolId) -> bool:
        return self.uses.get(pool, 0) > 0

    def write(self, address: int, block: Block) -> None:
        self.tags += 1
        block.tag = self.tags
        for at in (address, address + rounded(block.piece.bytes) - 4):
            ctypes.c_uint32.from_address(at).value = block.tag

    def watch(self, action: str, piece: Piece) -> None:
        """Judges an event by what the model knows of streams and pools."""
        if action == "map":
            assert self.mirror.mapped + piece.bytes <= self.limit
            assert piece.pool == SHARED or self.is_private(piece.pool)
        elif action == "unmap":
            assert not self.is_private(piece.pool), "a private pool's extent has gone"
            for stream, count in self.released.get(piece.pool, {}).items():
                assert self.passed(stream, count), "a released pool's extent has gone before its streams"
            for one in self.behind:
                assert not one.piece.touches(piece), "an extent has gone before its fence"
        elif action == "freed":
            for one in self.behind:
                if one.piece == piece:
                    assert not one.others, "a block came free that other streams use"
        elif action == "allocate":
            for one in self.behind:
                if one.piece.touches(piece):
                    assert not one.others, "reused while other streams use it"
                    lanes = [(one.stream, one.pool) for one in (one.piece, piece)]
                    assert lanes[0] == lanes[1], "reused by another stream or pool"

    def let_go(self, address: int) -> None:
        block = self.live.pop(address)
        self.gone.append(block.piece)
        own = self.submitted[block.piece.stream]
        waits = {s: self.submitted[s] for s in block.others if not self.passed(s, self.submitted[s])}
        if waits or not self.passed(block.piece.stream, own):
            self.behind.append(Behind(block.piece, own, waits))

    # Blocks.
    @rule(nbytes=SIZES, stream=STREAMS)
    def allocate(self, nbytes: int, stream: int) -> None:
        handle = self.streams[stream]
        pool = self.pool_for(handle)
        if pool in self.released:
            with pytest.raises(tem.InvalidArgument, match=rf"pool \({pool[0]}, 0\) does not exist, or has"):
                self.heap.allocate(nbytes, handle)
            return
        try:
            address = self.heap.allocate(nbytes, handle)
        except tem.OutOfMemory as error:
            assert "'training' asked for" in str(error) or "would exceed the limit" in str(error)
            self.see()
            # Each block keeps the extents it touches; between two of a lane there is less than one extent.
            held = sum(rounded(one.piece.bytes) + 2 * G for one in self.live.values())
            held += sum(one.bytes for one in self.mirror.extents.values() if self.is_private(one.pool))
            most = min(CAPACITY - self.rival.held, self.limit)
            assert held + rounded(nbytes) + G > most or not self.quiet(), "refused though there is room"
            return
        piece = Piece(address, nbytes, handle, pool)
        assert address % 512 == 0
        for block in self.live.values():
            assert not block.piece.touches(piece), "two live blocks overlap"
        self.live[address] = Block(piece)
        self.write(address, self.live[address])

    @rule(pick=PICKS, stream=STREAMS)
    def allocate_where_one_was(self, pick: int, stream: int) -> None:
        """It is there or it is not; what it is then lies where it was asked for, and obeys all else."""
        handle = self.streams[stream]
        pool = self.pool_for(handle)
        if not self.gone or pool in self.released:
            return
        before = picked(self.gone, pick)
        if not self.heap.allocate_at(before.address, before.bytes, handle):
            return
        piece = Piece(before.address, before.bytes, handle, pool)
        for block in self.live.values():
            assert not block.piece.touches(piece), "two live blocks overlap"
        self.live[before.address] = Block(piece)
        self.write(before.address, self.live[before.address])

    @rule(pick=PICKS)
    def free(self, pick: int) -> None:
        if not self.live:
            return
        address = picked(list(self.live), pick)
        self.let_go(address)
        self.heap.free(address)
        with pytest.raises(tem.InvalidArgument, match=f"{address:#x}, which is no live block"):
            self.heap.free(address)

    @rule(pick=PICKS, stream=STREAMS)
    def record_stream(self, pick: int, stream: int) -> None:
        if not self.live:
            return
        address = picked(list(self.live), pick)
        self.heap.record_stream(address, self.streams[stream])
        self.live[address].others |= {self.streams[stream]} - {self.live[address].piece.stream}

    # Streams.
    @rule(stream=st.integers(1, 2))
    def submit(self, stream: int) -> None:
        _C.host_stream_submit(self.streams[stream])
        self.submitted[self.streams[stream]] += 1

    @rule(stream=st.integers(1, 2), count=st.integers(1, 4))
    def complete(self, stream: int, count: int) -> None:
        handle = self.streams[stream]
        self.completed[handle] = min(self.completed[handle] + count, self.submitted[handle])
        for one in self.behind:
            one.others = {s: n for s, n in one.others.items() if not self.passed(s, n)}
        self.behind = [b for b in self.behind if b.others or not self.passed(b.piece.stream, b.own)]
        _C.host_stream_complete(handle, count)

    # Pools.
    @rule()
    def create_pool(self) -> None:
        pool = (len(self.uses) + len(self.released) + 1, 0)
        self.heap.create_pool(pool)
        self.uses[pool] = 1

    @rule(pick=PICKS, streams=st.sets(STREAMS, min_size=1))
    def begin_pool(self, pick: int, streams: set[int]) -> None:
        if not self.uses or len(self.begun) == 3:
            return
        pool = picked(sorted(self.uses), pick)
        handles = {self.streams[stream] for stream in streams}
        self.heap.begin_pool(pool, handles)
        self.uses[pool] += 1
        self.begun.append((pool, handles))

    @rule(pick=PICKS)
    def end_pool(self, pick: int) -> None:
        if not self.begun:
            return
        pool, _ = self.begun[pick % len(self.begun)]
        self.heap.end_pool(pool)
        at = max(i for i, (begun, _) in enumerate(self.begun) if begun == pool)
        del self.begun[at]

    @rule(pick=PICKS)
    def release_pool(self, pick: int) -> None:
        if not self.uses:
            return
        pool = picked(sorted(self.uses), pick)
        self.uses[pool] -= 1
        if self.uses[pool] == 0:
            del self.uses[pool]
            self.released[pool] = dict(self.submitted)
            self.checkpoints = [one for one in self.checkpoints if one[0] != pool]
        self.heap.release_pool(pool)
        assert self.heap.pool_uses(pool) == self.uses.get(pool, 0)

    @rule(pick=PICKS)
    def checkpoint(self, pick: int) -> None:
        if not self.uses:
            return
        pool = picked(sorted(self.uses), pick)
        placed = self.heap.live_in(pool)
        sizes = {a: block.piece.bytes for a, block in self.live.items() if block.piece.pool == pool}
        assert {one[0]: one[2] for one in placed} == sizes
        self.checkpoints.append((pool, placed, sizes))

    @rule(pick=PICKS)
    def restore(self, pick: int) -> None:
        if not self.checkpoints:
            return
        pool, placed, sizes = picked(self.checkpoints, pick)
        own = {a for a, block in self.live.items() if block.piece.pool == pool}
        shared = any(self.live[a].others for a in own)
        waits = any(one.others for one in self.behind if one.piece.pool == pool)
        try:
            freed = self.heap.restore(pool, placed)
        except tem.InvalidArgument as error:
            why = f"checkpoint of pool ({pool[0]}, 0) cannot be restored: other streams still use"
            assert why in str(error)
            parked = any(piece.pool == pool for piece in self.mirror.parked.values())
            assert shared or waits or (parked and not self.quiet())
            return
        assert not shared and not waits
        assert sorted(freed) == sorted(own)
        for address in own:
            self.let_go(address)
        places = {address: (stream, small) for address, _, _, stream, small, _ in placed}
        for address, nbytes in sizes.items():
            stream, small = places[address]
            assert small == (rounded(nbytes) <= MiB)
            self.live[address] = Block(Piece(address, nbytes, stream, pool))
            self.write(address, self.live[address])

    # Memory that others want.
    def check_all_idle_is_gone(self) -> None:
        self.see()
        for extent in self.mirror.extents.values():
            used = any(block.piece.touches(extent) for block in self.live.values())
            assert used or self.is_private(extent.pool), "an extent stays on which nothing lives"

    @rule()
    def trim(self) -> None:
        self.account.trim()
        if self.quiet():
            self.check_all_idle_is_gone()

    @rule()
    def empty_cache(self) -> None:
        if not self.begun and self.submitted != self.completed:
            return  # it would wait
        self.heap.empty_cache()
        if self.quiet():
            self.check_all_idle_is_gone()

    @rule(count=st.integers(1, CAPACITY // G))
    def a_higher_class_takes_what_is_free(self, count: int) -> None:
        try:
            self.wanted.ensure(range(count), 0, 0.0)
        except tem.OutOfMemory:
            return
        self.wanted.release(range(count), 0)

    @rule(more=st.one_of(st.none(), st.integers(0, 8 * MiB)))
    def set_limit(self, more: int | None) -> None:
        self.see()
        self.limit = EVER if more is None else self.mirror.mapped + more
        self.heap.limit = min(self.limit, EVER - 1)

    @rule(peak=st.booleans())
    def reset(self, peak: bool) -> None:
        while True:  # the arena's thread may be at work on a released pool
            self.see()
            if peak:
                self.heap.reset_peak()
            else:
                self.heap.reset_accumulated()
            for figure in self.mirror.figures.values():
                if peak:
                    figure.peak = figure.current
                else:
                    figure.allocated = figure.freed = 0
            if not self.see():
                return

    @rule(at=st.sampled_from([16, 512, 4096]))
    def a_pointer_that_is_no_block_is_named_in_the_refusal(self, at: int) -> None:
        wrong = [0, at, *(address + at for address in self.live if address + at not in self.live)]
        for address in wrong:
            for call in (self.heap.free, lambda a: self.heap.record_stream(a, 0)):
                name = f"{address:#x}" if address else r"\(nil\)"
                with pytest.raises(tem.InvalidArgument, match=f"{name}, which is no live block"):
                    call(address)

    # What must hold.
    def see(self) -> bool:
        return self.mirror.catch_up(self.watch)

    @invariant()
    def what_it_says_of_itself_is_so(self) -> None:
        if not hasattr(self, "heap"):
            return
        while True:
            self.see()
            stats, segments = self.heap.stats(), self.heap.segments()
            if not self.see():
                break
        self.mirror.check(stats, segments)
        assert self.mirror.live == {a: block.piece for a, block in self.live.items()}
        for pool in (*self.uses, *self.released):
            assert self.heap.segments(pool) == [one for one in segments if one["pool"] == pool]

    @invariant()
    def live_blocks_keep_their_contents(self) -> None:
        for address, block in getattr(self, "live", {}).items():
            for at in (address, address + rounded(block.piece.bytes) - 4):
                assert ctypes.c_uint32.from_address(at).value == block.tag

    @invariant()
    def no_extent_has_small_and_large_blocks(self) -> None:
        if hasattr(self, "heap"):
            for extent in self.mirror.extents.values():
                on = {b.piece.size for b in self.live.values() if b.piece.touches(extent)}
                assert len(on) < 2

    def teardown(self) -> None:
        if not hasattr(self, "heap"):
            return
        for pool, _ in list(self.begun):
            self.heap.end_pool(pool)
        for pool, uses in self.uses.items():
            for _ in range(uses):
                self.heap.release_pool(pool)
        if self.live:
            with pytest.raises(tem.InUseError, match="live blocks"):
                self.heap.close()
        for address in self.live:
            self.heap.free(address)
        self.heap.close()  # behind fences: streams are still at work on what was freed
        for stream in self.streams[1:]:
            _C.host_stream_complete(stream)
        self.arena.collect()
        self.wanted.close()
        self.account.close()
        self.rival.close()
        assert self.arena.snapshot().created == 0
        self.arena.close()
        for stream in self.streams[1:]:
            _C.host_stream_destroy(stream)


TestHeap = Heap.TestCase
TestHeap.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
