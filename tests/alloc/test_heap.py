"""Single properties of an account's malloc, on every rung."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import torch_elastic_mem as tem
from tests.alloc.home import Home
from tests.alloc.mirror import G
from tests.rungs import FakeRung, Rung


def test_extents_in_the_middle_go_back_while_neighbours_live(home: Home, rung: Rung) -> None:
    blocks = [home.heap.allocate(G, 0) for _ in range(8)]
    assert home.account.held == 8 * G
    for i, address in enumerate(blocks):
        rung.write(address, bytes([i]) * 64)
    for i in (1, 2, 5):
        home.heap.free(blocks[i])
    assert home.account.held == 8 * G, "free blocks stay cached until somebody needs them"
    assert home.account.trim() == 3 * G
    assert home.account.held == 5 * G
    for i in (0, 3, 4, 6, 7):
        assert rung.read(blocks[i], 64) == bytes([i]) * 64
        home.heap.free(blocks[i])


def test_a_hole_is_used_again(home: Home) -> None:
    blocks = [home.heap.allocate(G, 0) for _ in range(4)]
    home.heap.free(blocks[1])
    home.account.trim()
    assert home.heap.allocate(G, 0) == blocks[1]
    for address in blocks:
        home.heap.free(address)


def test_a_block_is_reused_at_once_on_its_stream_and_not_on_another(home: Home, rung: Rung) -> None:
    mine, other = rung.stream(), rung.stream()
    mine.submit()
    address = home.heap.allocate(G, mine.handle)
    home.heap.free(address)
    assert home.heap.allocate(G, mine.handle) == address
    home.heap.free(address)
    elsewhere = home.heap.allocate(G, other.handle)
    assert elsewhere != address
    home.heap.free(elsewhere)
    mine.complete()


def test_memory_of_a_slow_stream_is_no_ones_until_it_passed(rung: Rung) -> None:
    home = Home(rung, 4 * G)
    slow, other = rung.stream(), rung.stream()
    address = home.heap.allocate(4 * G, slow.handle)
    slow.submit()
    home.heap.free(address)
    with pytest.raises(tem.OutOfMemory, match="'training' asked for 8 MiB beside the 8 MiB it holds"):
        home.heap.allocate(4 * G, other.handle)
    slow.complete()
    home.heap.free(home.heap.allocate(4 * G, other.handle))
    home.heap.close()
    home.account.close()


def test_a_block_that_another_stream_uses_waits_for_it(home: Home, rung: Rung) -> None:
    reader = rung.stream()
    address = home.heap.allocate(G, 0)
    home.heap.record_stream(address, reader.handle)
    reader.submit()
    home.heap.free(address)
    assert home.heap.live_bytes == 0
    again = home.heap.allocate(G, 0)
    assert again != address
    assert home.account.trim() == 0
    reader.complete()
    home.heap.free(again)
    assert home.account.trim() == 2 * G


def test_a_heap_closed_before_its_streams_passed_keeps_the_memory_until_then(rung: Rung) -> None:
    home = Home(rung)
    mine, reader = rung.stream(), rung.stream()
    shared, own = home.heap.allocate(G, 0), home.heap.allocate(G, mine.handle)
    home.heap.record_stream(shared, reader.handle)
    mine.submit()
    reader.submit()
    home.heap.free(shared)
    home.heap.free(own)
    home.heap.close()
    home.arena.collect()
    assert home.account.held == 2 * G
    with pytest.raises(tem.InUseError, match="a fence that has not passed"):
        home.account.close()
    reader.complete()
    home.arena.collect()
    assert home.account.held == G
    mine.complete()
    home.account.close()
    assert home.arena.snapshot().created == 0


def test_zero_bytes_are_a_block_of_its_own(home: Home) -> None:
    first, second = home.heap.allocate(0, 0), home.heap.allocate(0, 0)
    assert first != second
    home.heap.free(first)
    home.heap.free(second)


def test_small_blocks_do_not_hold_large_extents(home: Home) -> None:
    large = home.heap.allocate(8 * G, 0)
    small = home.heap.allocate(100, 0)
    home.heap.free(large)
    assert home.account.trim() == 8 * G
    home.heap.free(small)


@pytest.mark.parametrize("nbytes", [33 * G, 1 << 40, 1 << 62, 2**64 - 1])
def test_more_than_there_is_is_out_of_memory(home: Home, nbytes: int) -> None:
    keep = home.heap.allocate(G, 0)
    with pytest.raises(tem.TemError) as refused:
        home.heap.allocate(nbytes, 0)
    assert isinstance(refused.value, tem.OutOfMemory), refused.value
    assert home.heap.live_bytes == home.account.held == G
    home.heap.free(keep)


def test_out_of_memory_says_what_was_asked_who_holds_it_and_what_to_do(home: Home) -> None:
    keep = home.heap.allocate(20 * G, 0)
    with pytest.raises(tem.OutOfMemory) as refused:
        home.heap.allocate(20 * G, 0)
    for words in (
        "'training' asked for 40 MiB",
        "24 MiB of 64 MiB is free",
        "training holds 40 MiB",
        "To go on:",
    ):
        assert words in str(refused.value)
    home.heap.free(keep)


def test_a_double_free_names_the_pointer_and_changes_nothing(home: Home) -> None:
    address, keep = home.heap.allocate(4096, 0), home.heap.allocate(4096, 0)
    home.heap.free(address)
    for wrong in (address, keep + 512, 0xDEAD000):
        with pytest.raises(
            tem.InvalidArgument, match=f"free of {wrong:#x}, .*freed twice, or never allocated"
        ):
            home.heap.free(wrong)
    assert home.heap.live_bytes == 4096
    home.heap.free(keep)


def test_a_heap_is_not_closed_under_live_blocks(home: Home) -> None:
    small, large = home.heap.allocate(100, 0), home.heap.allocate(G, 0)
    for address, live in ((small, 2), (large, 1)):
        with pytest.raises(tem.InUseError, match=f"{live} live blocks"):
            home.heap.close()
        with pytest.raises(tem.InUseError, match="account 'training' still has"):
            home.account.close()
        home.heap.free(address)


class Load:
    """Blocks in a heap and, step by step, what is done to them. A step that fails has done nothing."""

    def __init__(self, rung: Rung) -> None:
        self.home = Home(rung)
        self.slow = rung.stream()
        self.old = self.home.heap.allocate(3 * G, self.slow.handle)
        self.shared = self.home.heap.allocate(G, 0)
        self.live = {self.old, self.shared}
        self.slow.submit()
        self.home.heap.record_stream(self.shared, self.slow.handle)

    def grow(self) -> None:
        self.live.add(self.home.heap.allocate(5 * G, 0))

    def free(self, address: int) -> None:
        self.home.heap.free(address)
        self.live.remove(address)

    def steps(self) -> list[Callable[[], object]]:
        trim = self.home.account.trim
        return [
            self.grow,
            lambda: self.free(self.shared),
            lambda: self.free(self.old),
            *(trim, self.slow.complete, trim),
        ]

    def close(self) -> None:
        for address in list(self.live):
            self.free(address)
        self.home.heap.close()
        self.home.account.trim()
        assert self.home.account.held == 0
        self.home.account.close()
        assert self.home.arena.snapshot().created == self.home.arena.snapshot().lost == 0
        self.home.arena.close()


@pytest.mark.rungs("fake")
@pytest.mark.parametrize("code", [2, 999])
def test_every_failing_driver_call_leaves_all_as_it_was(rung: FakeRung, code: int) -> None:
    n, reached = 0, True
    while reached:
        n += 1
        load, failed = Load(rung), False
        rung.fail_nth(n, code)
        for step in load.steps():
            before = set(load.live)
            try:
                step()
            except (tem.OutOfMemory, tem.DriverError):
                assert load.live == before
                failed = True
                rung.fail_nth(0)
                step()
        reached = failed or rung.calls() >= n
        rung.fail_nth(0)
        load.close()
        del load, step
    assert n > 10


@pytest.mark.parametrize("reader_is_behind", [True, False])
def test_the_fence_of_a_block_is_the_moment_of_its_free(
    home: Home, rung: Rung, reader_is_behind: bool
) -> None:
    mine, reader = rung.stream(), rung.stream()
    blocks = [home.heap.allocate(G // 4, mine.handle) for _ in range(4)]
    home.heap.record_stream(blocks[3], reader.handle)
    if reader_is_behind:
        reader.submit()
    for address in blocks:
        home.heap.free(address)
    mine.submit()  # what comes after the frees holds nothing up
    assert home.account.trim() == (0 if reader_is_behind else G)
    reader.complete()
    home.account.trim()
    assert home.account.held == 0
    mine.complete()
