"""Growth: all or nothing, under addresses that never move, in as few extents as will do."""

from __future__ import annotations

import pytest

from tests.arena.watch import EXTENT, MiB, assert_balanced, books, calls, filled
from tests.rungs import FakeRung, Rung
from torch_elastic_mem.errors import InvalidArgument, OutOfMemory


def test_what_was_grown_can_be_written_and_read(rung: Rung) -> None:
    account = rung.arena().account("a")
    memory = account.range(16 * MiB)
    memory.grow(6 * MiB)
    assert memory.mapped == 6 * MiB == account.held
    rung.write(memory.address + 6 * MiB - 4, b"tail")
    assert rung.read(memory.address + 6 * MiB - 4, 4) == b"tail"


def test_addresses_and_contents_stay_while_a_range_grows_and_shrinks(rung: Rung) -> None:
    arena = rung.arena()
    memory = arena.account("a").range(32 * MiB)
    memory.grow(2 * MiB)
    address = memory.address
    rung.write(address, b"here")
    for _ in range(3):
        memory.grow(12 * MiB)
        memory.grow(4 * MiB)
        memory.shrink(16 * MiB)
        assert memory.address == address
        assert rung.read(address, 4) == b"here"
    assert_balanced(arena)


def test_two_ranges_never_share_addresses(rung: Rung) -> None:
    account = rung.arena().account("a")
    ranges = [filled(account, 4 * MiB) for _ in range(4)]
    for i, memory in enumerate(ranges):
        rung.write(memory.address, bytes([i]) * 4)
    assert [rung.read(memory.address, 1)[0] for memory in ranges] == [0, 1, 2, 3]


def test_growth_that_does_not_fit_takes_nothing(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    account = arena.account("a")
    memory = account.range(64 * MiB)
    memory.grow(10 * MiB)
    before = books(rung, arena)
    with pytest.raises(OutOfMemory) as refused:
        memory.grow(8 * MiB)
    assert books(rung, arena) == before
    assert (memory.mapped, memory.resident) == (10 * MiB, 10 * MiB)
    words = ("asked for 8 MiB", "10 MiB it holds", "6 MiB of 16 MiB is free", "a holds 10 MiB", "To go on")
    assert all(word in str(refused.value) for word in words), refused.value
    memory.grow(6 * MiB)
    assert arena.snapshot().free == 0


def test_growth_beyond_the_addresses_takes_nothing(rung: Rung) -> None:
    account = rung.arena().account("a")
    memory = account.range(4 * MiB)
    with pytest.raises(InvalidArgument, match="4 MiB of its addresses are left"):
        memory.grow(6 * MiB)
    assert account.held == 0


@pytest.mark.rungs("fake")
def test_large_growth_makes_few_large_extents(rung: FakeRung) -> None:
    memory = rung.arena(256 * MiB).account("a").range(256 * MiB)
    for nbytes, extents in ((64 * MiB, 1), (128 * MiB, 2), (2 * MiB, 1), (30 * MiB, 4)):
        before = [calls(rung, name) for name in ("cuMemCreate", "cuMemMap", "cuMemSetAccess")]
        memory.grow(nbytes)
        after = [calls(rung, name) for name in ("cuMemCreate", "cuMemMap", "cuMemSetAccess")]
        creates, maps, accesses = (b - a for a, b in zip(before, after, strict=True))
        assert creates == maps <= extents
        assert accesses == 1, "one call makes the whole run accessible"


@pytest.mark.rungs("fake")
def test_many_small_growths_make_few_driver_calls_and_waste_little(rung: FakeRung) -> None:
    memory = rung.arena(256 * MiB).account("a").range(256 * MiB)
    before = calls(rung, "cuMemCreate")
    for _ in range(120):
        memory.grow(EXTENT)
        assert memory.resident - memory.mapped <= memory.resident / 32 + EXTENT
    assert calls(rung, "cuMemCreate") - before < 100


@pytest.mark.rungs("fake")
def test_growth_ahead_is_only_from_what_is_free(rung: FakeRung) -> None:
    arena = rung.arena(132 * MiB)
    memory = arena.account("a").range(256 * MiB)
    memory.grow(130 * MiB)
    memory.grow(EXTENT)
    assert memory.resident == 132 * MiB


def test_an_extent_goes_with_the_last_that_lives_on_it(rung: Rung) -> None:
    account = rung.arena().account("a")
    memory = account.range(16 * MiB)
    memory.grow(8 * MiB)
    memory.shrink(6 * MiB)
    assert (memory.mapped, account.held) == (2 * MiB, 8 * MiB), "one extent of 8 MiB, on which 2 still live"
    memory.shrink(2 * MiB)
    assert account.held == 0


def test_shrinking_gives_back_extents_one_by_one(rung: Rung) -> None:
    arena = rung.arena()
    account = arena.account("a")
    memory = filled(account, 8 * MiB)
    for left in (6, 4, 2, 0):
        memory.shrink(EXTENT)
        assert account.held == left * MiB
    assert_balanced(arena)


@pytest.mark.rungs("fake")
def test_memory_that_is_given_back_goes_back_to_the_driver(rung: FakeRung) -> None:
    memory = filled(rung.arena().account("a"), 32 * MiB)
    assert rung.live()[0] == rung.before[0] + 16
    memory.shrink(32 * MiB)
    assert rung.live()[:2] == rung.before[:2]
