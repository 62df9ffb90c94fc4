"""A heap whose memory goes under what lives, and comes back to the same addresses, on every rung."""

from __future__ import annotations

import pytest

import torch_elastic_mem as tem
from tests.alloc.home import Home
from tests.alloc.mirror import G, KiB
from tests.arena.watch import comes_true, filled
from tests.rungs import FakeRung, Rung

PRESSING = tem.PriorityClass("pressing", 10**6)


def blocks_of_all_sizes(home: Home) -> list[int]:
    return [home.heap.allocate(nbytes, 0) for nbytes in (100, 8 * KiB, 300 * KiB, G, 3 * G + KiB)]


def gone(home: Home) -> bool:
    return comes_true(lambda: home.account.held == 0)


def free(home: Home, blocks: list[int]) -> None:
    for block in blocks:
        home.heap.free(block)


def test_what_is_put_away_costs_nothing_and_lives_on_at_its_addresses(home: Home, rung: Rung) -> None:
    blocks = blocks_of_all_sizes(home)
    held, segments = home.account.held, home.heap.segments()
    home.heap.put_away()
    assert gone(home)
    home.heap.bring_back(0, 1.0)
    assert (home.account.held, home.heap.segments()) == (held, segments)
    for block in blocks:
        rung.write(block, b"here")
        assert rung.read(block, 4) == b"here"
    free(home, blocks)


def test_nothing_goes_before_the_device_has_done_what_it_was_given(home: Home, rung: Rung) -> None:
    stream = rung.stream()
    block = home.heap.allocate(G, stream.handle)
    stream.submit()
    home.heap.put_away()
    assert not comes_true(lambda: home.account.held == 0, 0.05)
    stream.complete()
    assert gone(home)
    home.heap.bring_back(0, 1.0)
    home.heap.free(block)


def test_what_has_not_gone_yet_when_it_is_brought_back_stays(home: Home, rung: Rung) -> None:
    stream = rung.stream()
    block = home.heap.allocate(G, stream.handle)
    rung.write(block, b"kept")
    stream.submit()
    home.heap.put_away()
    home.heap.bring_back(0, 1.0)
    stream.complete()
    home.arena.collect()
    assert rung.read(block, 4) == b"kept"
    home.heap.free(block)


def test_blocks_may_be_freed_while_they_are_away(home: Home) -> None:
    blocks = blocks_of_all_sizes(home)
    home.heap.put_away()
    assert gone(home)
    free(home, blocks)
    assert home.heap.live_bytes == 0
    home.heap.bring_back(0, 1.0)
    home.account.trim()
    assert home.account.held == 0
    again = blocks_of_all_sizes(home)
    free(home, again)


def test_a_heap_that_is_away_gives_nothing_out(home: Home) -> None:
    block = home.heap.allocate(KiB, 0)
    home.heap.put_away()
    for nbytes in (KiB, 2 * G):
        with pytest.raises(tem.InUseError, match="put away"):
            home.heap.allocate(nbytes, 0)
    assert gone(home)
    home.heap.bring_back(0, 1.0)
    home.heap.free(block)


def test_a_refusal_leaves_it_away_and_says_who_holds_the_memory(home: Home) -> None:
    blocks = blocks_of_all_sizes(home)
    held = home.account.held
    home.heap.put_away()
    assert gone(home)
    with home.arena.account("neighbour", PRESSING) as other:
        taken = filled(other, other.room() - held + G)
        with pytest.raises(tem.OutOfMemory, match="neighbour"):
            home.heap.bring_back(0, 0.01)
        assert home.account.held == 0
        taken.close()
        home.arena.collect()
    home.heap.bring_back(0, 1.0)
    assert home.account.held == held
    free(home, blocks)


def test_others_yield_for_what_comes_back(home: Home) -> None:
    block = home.heap.allocate(G, 0)
    home.heap.put_away()
    assert gone(home)
    with home.arena.account("lower", tem.PriorityClass("lower", -1)) as other:
        taken = filled(other, other.room())
        other.on_reclaim(lambda nbytes, timeout: taken.shrink(nbytes), "pause")
        home.heap.bring_back(0, 1.0)
        assert home.account.held == G
        taken.close()
        home.arena.collect()
    home.heap.free(block)


def test_putting_away_and_bringing_back_twice_changes_nothing(home: Home) -> None:
    block = home.heap.allocate(G, 0)
    home.heap.bring_back(0, 1.0)
    home.heap.put_away()
    home.heap.put_away()
    assert gone(home)
    home.heap.bring_back(0, 1.0)
    home.heap.bring_back(0, 1.0)
    assert home.account.held == G
    home.heap.free(block)


def test_one_that_is_away_and_empty_can_be_closed(home: Home) -> None:
    block = home.heap.allocate(G, 0)
    home.heap.put_away()
    with pytest.raises(tem.InUseError):
        home.heap.close()
    home.heap.free(block)


def test_figures_follow_the_memory(home: Home) -> None:
    block = home.heap.allocate(3 * G, 0)

    def reserved() -> int:
        return int(home.heap.stats()["reserved_bytes"]["all"]["current"])

    before = reserved()
    home.heap.put_away()
    assert gone(home)
    assert (reserved(), home.heap.stats()["allocation"]["all"]["current"]) == (0, 1)
    home.heap.bring_back(0, 1.0)
    assert reserved() == before
    home.heap.free(block)


@pytest.mark.rungs("fake")
@pytest.mark.parametrize("code", [2, 999])
def test_whatever_call_of_the_driver_fails_it_is_whole_or_away(rung: FakeRung, code: int) -> None:
    n, reached = 0, True
    while reached:
        n += 1
        home = Home(rung)
        blocks = blocks_of_all_sizes(home)
        held = home.account.held
        rung.fail_nth(n, code)
        try:
            home.heap.put_away()
        except tem.InUseError:
            assert home.account.held == held
            home.heap.put_away()
        assert gone(home), "what the driver refused to unmap goes with a later try"
        try:
            home.heap.bring_back(0, 1.0)
        except (tem.OutOfMemory, tem.DriverError):
            assert home.account.held == 0
            rung.fail_nth(0)
            home.heap.bring_back(0, 1.0)
        reached = rung.calls() >= n
        rung.fail_nth(0)
        assert home.account.held == held
        for block in blocks:
            rung.write(block, b"here")
        free(home, blocks)
        home.close()
    assert n > 5
