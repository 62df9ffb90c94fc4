"""Where blocks go, and what a growth maps for them."""

from __future__ import annotations

import threading

import pytest

import torch_elastic_mem as tem
from tests.alloc.home import Home
from tests.alloc.mirror import G, KiB, MiB
from tests.arena.watch import filled
from tests.rungs import FakeRung, Rung


def holes(home: Home, sizes: list[int]) -> list[int]:
    """Free spans of these sizes, in this order of addresses, with a live block behind each."""
    blocks = [home.heap.allocate(n, 0) for size in sizes for n in (size, 64 * KiB + MiB)]
    for block in blocks[::2]:
        home.heap.free(block)
    home.heap.free(home.heap.allocate(20 * G, 0))  # what was set aside as hot is listed
    return blocks[::2]


def test_the_smallest_free_span_that_fits_is_used_and_of_equals_the_lowest(home: Home) -> None:
    large, fits, again, small = holes(home, [4 * G, 2 * G, 2 * G, G + MiB])
    assert home.heap.allocate(2 * G - 64 * KiB, 0) == fits
    assert home.heap.allocate(2 * G, 0) == again
    assert home.heap.allocate(2 * G, 0) == large
    assert home.heap.allocate(G + MiB, 0) == small
    home.free_all()


def test_what_can_still_grow_is_cut_last(home: Home) -> None:
    """Else a block that is larger than all before it finds the edge in use, and maps all of its bytes."""
    inner, _, edge = (home.heap.allocate(n, 0) for n in (8 * G, G + MiB, 3 * G))
    home.heap.free(inner)
    home.heap.free(edge)
    held = home.account.held
    assert home.heap.allocate(2 * G, 0) == inner, "the free bytes at the edge would fit better"
    assert home.heap.allocate(3 * G, 0) == inner + 2 * G
    assert home.heap.allocate(4 * G, 0) <= edge
    assert home.account.held == held + G, "4 extents, of which 3 were free at the edge"
    assert home.heap.allocate(3 * G, 0) == inner + 5 * G
    home.free_all()


def test_where_nothing_else_is_free_the_edge_is_used(home: Home) -> None:
    _, edge = (home.heap.allocate(n, 0) for n in (2 * G, 3 * G))
    home.heap.free(edge)
    held = home.account.held
    assert home.heap.allocate(2 * G, 0) == edge
    assert home.account.held == held
    home.free_all()


def test_growth_extends_a_free_span_at_the_edge_before_it_starts_a_new_run(home: Home) -> None:
    first = home.heap.allocate(G, 0)
    tail = home.heap.allocate(G + MiB, 0)  # leaves 1 MiB free at the edge
    assert home.account.held == 4 * G - G
    grown = home.heap.allocate(2 * G, 0)
    assert grown == tail + G + MiB
    assert home.account.held == 5 * G, "2 MiB of it was there but for 1 MiB"
    for block in (first, tail, grown):
        home.heap.free(block)


def test_growth_fills_a_hole_between_free_spans_with_no_more_than_is_missing(home: Home) -> None:
    blocks = [home.heap.allocate(n, 0) for n in (G + MiB, 5 * G, G + MiB)]
    held = home.account.held
    home.heap.free(blocks[1])
    missing = home.account.trim()
    assert 3 * G < missing < 6 * G
    assert home.heap.allocate(5 * G, 0) == blocks[1]
    assert home.account.held == held
    home.free_all()


def test_a_large_block_that_grows_step_by_step_reserves_no_more_than_it_needs(home: Home) -> None:
    nbytes = G
    while nbytes <= 20 * G:
        block = home.heap.allocate(nbytes, 0)
        assert home.account.held == nbytes
        home.heap.free(block)
        nbytes += G


# The limit.
def test_the_limit_is_held_after_what_is_idle_has_gone(home: Home) -> None:
    home.heap.limit = 8 * G
    home.heap.free(home.heap.allocate(100, 0))
    block = home.heap.allocate(8 * G, 0)
    assert home.account.held == 8 * G
    with pytest.raises(tem.OutOfMemory) as refused:
        home.heap.allocate(G, 0)
    for words in ("2 MiB more would exceed the limit of 16 MiB", "of which 16 MiB is mapped", "free some"):
        assert words in str(refused.value)
    assert home.account.held == home.heap.live_bytes == 8 * G
    home.heap.limit = 9 * G
    home.heap.free(home.heap.allocate(G, 0))
    home.heap.free(block)


@pytest.mark.rungs("fake")
def test_growth_ahead_of_need_stays_below_the_limit(rung: FakeRung) -> None:
    home = Home(rung, 100 * G)
    blocks = [home.heap.allocate(70 * G, 0)]
    home.heap.limit = 71 * G
    blocks.append(home.heap.allocate(G, 0))
    assert home.account.held == 71 * G
    for block in blocks:
        home.heap.free(block)
    home.close()


@pytest.mark.rungs("fake")
def test_what_growth_takes_ahead_of_need_waits_for_its_memset(rung: FakeRung) -> None:
    home = Home(rung, 80 * G, reserve=(0, 8 * G))
    other = home.arena.account("other")
    filled(other, 4 * G).close()  # leaves warm extents that another tenant wrote to
    mine = rung.stream()
    home.heap.free(home.heap.allocate(G, mine.handle))
    keep = home.heap.allocate(68 * G, 0)
    mine.submit()
    block = home.heap.allocate(2 * G, mine.handle)
    assert home.account.held == 71 * G, "one extent more than was asked for"
    assert home.account.trim() == 0, "a memset of it is queued"
    mine.complete()
    assert rung.read(block, 64) == bytes(64)
    assert home.account.trim() == G
    for one in (block, keep):
        home.heap.free(one)
    other.close()
    home.close()


# Giving all of it back.
def test_empty_cache_waits_for_the_streams_and_returns_everything(home: Home, rung: Rung) -> None:
    mine, reader = rung.stream(), rung.stream()
    blocks = [home.heap.allocate(n, mine.handle) for n in (100, 100 * KiB, 3 * G)]
    for block in blocks:
        home.heap.record_stream(block, reader.handle)
    mine.submit()
    reader.submit()
    for block in blocks:
        home.heap.free(block)
    done = threading.Event()

    def empty() -> None:
        home.heap.empty_cache()
        done.set()

    thread = threading.Thread(target=empty)
    thread.start()
    assert not done.wait(0.02) and home.account.held == 4 * G
    reader.complete()
    assert not done.wait(0.02) and home.account.held == 4 * G
    mine.complete()
    thread.join()
    assert home.account.held == 0
    assert home.heap.stats()["waits"] > 0
    stats = home.heap.stats()
    assert stats["maps"] == stats["unmaps"] > 0
