"""An account's malloc against a model: who owns which bytes, what is in them, and what can go back."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import torch_elastic_mem as tem
from torch_elastic_mem import _C

pytestmark = pytest.mark.core

KiB, MiB = 1 << 10, 1 << 20
G = 2 * MiB
CAPACITY = 32 * G
ALIGNMENT = 512
LARGEST_EXTENT = 8 * MiB  # the largest power of two in the largest size below
SIZES = st.one_of(
    st.integers(0, 4 * KiB),
    st.integers(4 * KiB, MiB),
    st.sampled_from([1, 511, 512, 513, MiB, MiB + 1, G - 1, G, G + 1]),
    st.integers(MiB, 12 * MiB),
)


def rounded(nbytes: int) -> int:
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


class Heap(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.arena = tem.Arena("host", capacity=CAPACITY)
        self.account = self.arena.account("training")
        self.rival = self.arena.account("serving", "serving")
        self.wanted = _C.BlockRange(self.rival._core, "what serving wants", CAPACITY // G, G)
        self.heap = _C.Allocator(self.account._core, "training")
        self.streams = [0, _C.host_stream_create(), _C.host_stream_create()]
        self.pending = [False, False, False]
        self.live: dict[int, tuple[int, int]] = {}  # address -> bytes, stream
        self.recorded: dict[int, set[int]] = {}  # address -> other streams
        self.tags: dict[int, int] = {}
        # Freed bytes that streams may still touch, as (begin, end, streams): nobody else's until they passed.
        self.parked: list[tuple[int, int, set[int]]] = []
        # Freed bytes whose own stream is behind: only that stream's, until it passed.
        self.behind: list[tuple[int, int, int]] = []

    # The model.
    def write(self, address: int) -> None:
        self.tags[address] = len(self.tags) + 7
        for at in self.ends(address):
            ctypes.c_uint32.from_address(at).value = self.tags[address]

    def ends(self, address: int) -> tuple[int, int]:
        return address, address + rounded(self.live[address][0]) - 4

    def check_new(self, address: int, nbytes: int, stream: int) -> None:
        assert address % ALIGNMENT == 0
        begin, end = address, address + rounded(nbytes)
        for other, (size, _) in self.live.items():
            assert end <= other or other + rounded(size) <= begin, "two live blocks overlap"
        for first, last, streams in self.parked:
            assert end <= first or last <= begin, f"reused before the streams {streams} passed"
        for first, last, owner in self.behind:
            assert end <= first or last <= begin or owner == stream, f"reused before stream {owner} passed"

    def settled(self) -> bool:
        return not self.parked and not self.behind

    # What is done to it.
    @rule(nbytes=SIZES, stream=st.integers(0, 2))
    def allocate(self, nbytes: int, stream: int) -> None:
        try:
            address = self.heap.allocate(nbytes, self.streams[stream])
        except tem.OutOfMemory as error:
            assert "'training' asked for" in str(error)
            # Each block keeps the extents it touches; between two of a stream there is less than one extent.
            if self.settled():
                held = sum(rounded(size) + 2 * G for size, _ in self.live.values())
                assert held + rounded(nbytes) + G + self.rival.held > CAPACITY
            return
        self.check_new(address, nbytes, stream)
        self.live[address] = nbytes, stream
        self.recorded[address] = set()
        self.write(address)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.live)))
        nbytes, stream = self.live.pop(address)
        del self.tags[address]
        self.heap.free(address)
        end = address + rounded(nbytes)
        if waits := {s for s in self.recorded.pop(address) if self.pending[s]}:
            self.parked.append((address, end, waits))
        if self.pending[stream]:
            self.behind.append((address, end, stream))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), stream=st.integers(0, 2))
    def record_stream(self, data: st.DataObject, stream: int) -> None:
        address = data.draw(st.sampled_from(sorted(self.live)))
        self.heap.record_stream(address, self.streams[stream])
        if stream != self.live[address][1]:
            self.recorded[address].add(stream)

    @rule(stream=st.integers(1, 2))
    def submit(self, stream: int) -> None:
        _C.host_stream_submit(self.streams[stream])
        self.pending[stream] = True

    @rule(stream=st.integers(1, 2))
    def complete(self, stream: int) -> None:
        _C.host_stream_complete(self.streams[stream])
        self.pending[stream] = False
        self.parked = [(a, b, rest) for a, b, on in self.parked if (rest := on - {stream})]
        self.behind = [entry for entry in self.behind if entry[2] != stream]

    @rule()
    def trim_gives_back_every_extent_without_a_live_block(self) -> None:
        self.account.trim()
        if not self.settled():
            return
        pieces = [(a, a + rounded(size)) for a, (size, _) in self.live.items()]
        # An extent has a live block on it, and none is larger than the largest block that may have made it.
        assert bool(self.account.held) == bool(pieces)
        assert self.account.held <= sum(end - begin + 2 * LARGEST_EXTENT for begin, end in pieces)

    @rule(count=st.integers(1, CAPACITY // G))
    def a_higher_class_takes_what_is_free(self, count: int) -> None:
        try:
            self.wanted.ensure(range(count), 0, 0.0)
        except tem.OutOfMemory:
            return
        self.wanted.release(range(count), 0)

    @rule(at=st.sampled_from([16, 512, 4096]))
    def a_pointer_that_is_no_block_is_named_in_the_refusal(self, at: int) -> None:
        wrong = [0, at, *(address + at for address in self.live if address + at not in self.live)]
        for address in wrong:
            for call in (self.heap.free, lambda a: self.heap.record_stream(a, 0)):
                name = f"{address:#x}" if address else r"\(nil\)"
                with pytest.raises(tem.InvalidArgument, match=f"{name}, which is no live block"):
                    call(address)

    # What must hold.
    @invariant()
    def live_blocks_keep_their_contents(self) -> None:
        for address in getattr(self, "live", ()):
            for at in self.ends(address):
                assert ctypes.c_uint32.from_address(at).value == self.tags[address]

    @invariant()
    def live_bytes_and_charges_agree(self) -> None:
        if hasattr(self, "heap"):
            live = sum(rounded(size) for size, _ in self.live.values())
            assert self.heap.live_bytes == live
            assert live <= self.account.held <= CAPACITY
            assert self.account.held % G == 0

    def teardown(self) -> None:
        if not hasattr(self, "heap"):
            return
        if self.live:
            with pytest.raises(tem.InUseError, match="live blocks"):
                self.heap.close()
        for address in self.live:
            self.heap.free(address)
        self.heap.close()  # behind fences: streams are still at work on what was freed
        assert self.settled() or self.account.held > 0
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
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
