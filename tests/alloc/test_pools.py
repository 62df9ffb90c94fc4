"""Private pools, on every rung."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import torch_elastic_mem as tem
from tests.alloc.home import Home
from tests.alloc.mirror import G, KiB, MiB, PoolId
from tests.arena.watch import comes_true
from tests.rungs import Rung

POOL = (1, 0)
OTHER = (2, 7)


def test_a_private_pool_and_the_shared_one_never_use_each_others_memory(home: Home) -> None:
    for nbytes in (512, 200 * KiB, G // 2 + MiB):
        home.heap.free(home.heap.allocate(nbytes, 0))
        cached = home.account.held
        with home.pool(POOL):
            block = home.heap.allocate(nbytes, 0)
        assert home.account.held == cached + G
        home.heap.free(block)
        outside = home.heap.allocate(nbytes, 0)
        assert home.account.held == cached + G
        with home.pool(POOL):
            assert home.heap.allocate(nbytes, 0) == block
        home.heap.free(block)
        home.heap.free(outside)
        while home.heap.pool_uses(POOL):
            home.heap.release_pool(POOL)
        home.account.trim()
        assert home.account.held == 0


def test_only_streams_that_pass_the_filter_come_from_the_pool(home: Home, rung: Rung) -> None:
    inside, outside = rung.stream().handle, rung.stream().handle
    with home.pool(POOL, inside):
        blocks = [home.heap.allocate(G, inside), home.heap.allocate(G, outside)]
    assert [one["stream"] for one in home.heap.segments(POOL)] == [inside]
    for block in blocks:
        home.heap.free(block)
    home.heap.release_pool(POOL)


def test_of_nested_pools_the_inner_one_serves_and_then_the_outer_one_again(home: Home) -> None:
    blocks = []
    with home.pool(POOL):
        blocks.append(home.heap.allocate(G, 0))
        with home.pool(OTHER):
            blocks.append(home.heap.allocate(G, 0))
        blocks.append(home.heap.allocate(G, 0))
    assert [one[0] for one in home.heap.live_in(POOL)] == sorted((blocks[0], blocks[2]))
    assert [one[0] for one in home.heap.live_in(OTHER)] == [blocks[1]]
    for block in blocks:
        home.heap.free(block)
    for pool in (POOL, OTHER):
        home.heap.release_pool(pool)


def test_what_a_pool_holds_stays_mapped_while_it_has_uses(home: Home) -> None:
    home.heap.create_pool(POOL)
    with home.pool(POOL):
        for nbytes in (100, 3 * G):
            home.heap.free(home.heap.allocate(nbytes, 0))
    home.heap.release_pool(POOL)
    assert home.heap.pool_uses(POOL) == 1
    home.heap.empty_cache()
    assert home.account.trim() == 0 and home.account.held == 4 * G
    with pytest.raises(tem.OutOfMemory):
        home.heap.allocate(30 * G, 0)
    home.heap.release_pool(POOL)
    assert home.account.held == 0, "it goes with the last use, without being asked for"


def test_a_released_pool_waits_for_all_that_was_submitted_before_on_any_stream(
    home: Home, rung: Rung
) -> None:
    busy, late = rung.stream(), rung.stream()
    with home.pool(POOL):
        home.heap.free(home.heap.allocate(G, 0))
    busy.submit()  # a graph that touches it may be running there
    home.heap.release_pool(POOL)
    late.submit()
    assert home.account.trim() == 0 and home.account.held == G
    busy.complete()
    assert comes_true(lambda: home.account.held == 0)
    late.complete()


def test_a_block_that_outlives_its_pool_keeps_its_extent_until_it_is_freed(home: Home) -> None:
    with home.pool(POOL):
        stays, goes = home.heap.allocate(G, 0), home.heap.allocate(G, 0)
    home.heap.free(goes)
    home.heap.release_pool(POOL)
    assert home.account.held == G
    elsewhere = home.heap.allocate(G, 0)
    home.heap.free(stays)
    assert comes_true(lambda: home.account.held == G)
    home.heap.free(elsewhere)


def test_the_same_id_after_a_release_is_a_pool_of_its_own(home: Home) -> None:
    with home.pool(POOL):
        old = home.heap.allocate(G, 0)
    home.heap.release_pool(POOL)
    with home.pool(POOL):
        new = home.heap.allocate(G, 0)
    assert [one[0] for one in home.heap.live_in(POOL)] == [new]
    home.heap.free(old)
    assert comes_true(lambda: home.account.held == G)
    home.heap.free(new)
    home.heap.release_pool(POOL)


def test_a_pool_that_is_not_there_is_named_in_the_refusal(home: Home) -> None:
    heap = home.heap
    calls: list[Callable[[PoolId], object]] = [
        *(heap.release_pool, heap.live_in),
        lambda pool: heap.restore(pool, []),
    ]
    for call in calls:
        with pytest.raises(tem.InvalidArgument, match=r"pool \(2, 7\) does not exist, or has been released"):
            call(OTHER)
    with pytest.raises(tem.InvalidArgument, match=r"pool \(2, 7\) was not begun, or has ended already"):
        heap.end_pool(OTHER)
    assert heap.pool_uses(OTHER) == 0
    heap.begin_pool(POOL, {0})
    heap.release_pool(POOL)
    with pytest.raises(tem.InvalidArgument, match=r"pool \(1, 0\) does not exist, or has been released"):
        heap.allocate(G, 0)
    heap.end_pool(POOL)
    heap.free(heap.allocate(G, 0))


@pytest.mark.parametrize("name", ["create_pool", "release_pool"])
def test_the_pool_of_everybody_is_neither_made_nor_released(home: Home, name: str) -> None:
    with pytest.raises(tem.InvalidArgument, match=r"pool \(0, 0\) is everybody's"):
        getattr(home.heap, name)((0, 0))
    home.heap.free(home.heap.allocate(G, 0))
    assert home.account.held == G, "cached as ever"


def test_a_heap_closed_before_its_pool_is_released_keeps_the_pools_memory_until_then(rung: Rung) -> None:
    home = Home(rung)
    with home.pool(POOL):
        home.heap.free(home.heap.allocate(G, 0))
    home.heap.free(home.heap.allocate(G, 0))
    home.heap.close()
    assert home.account.held == G
    home.heap.release_pool(POOL)
    assert comes_true(lambda: home.account.held == 0)
    home.account.close()
