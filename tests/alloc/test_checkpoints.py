"""A private pool as it was, as for the replay of one of several graphs, on every rung."""

from __future__ import annotations

import pytest

import torch_elastic_mem as tem
from tests.alloc.home import Home
from tests.alloc.mirror import G, KiB
from tests.rungs import Rung

POOL = (1, 0)


def test_a_restore_puts_back_the_same_blocks_and_says_which_were_freed(home: Home) -> None:
    with home.pool(POOL):
        kept = [home.heap.allocate(n, 0) for n in (512, 5000, 600 * KiB, 3 * G)]
        checkpoint = home.heap.live_in(POOL)
        for block in kept[::2]:
            home.heap.free(block)
        new = [home.heap.allocate(n, 0) for n in (100, 100 * KiB, G)]
    held, before = home.account.held, home.heap.live_bytes
    freed = home.heap.restore(POOL, checkpoint)
    assert sorted(freed) == sorted([*kept[1::2], *new])
    assert home.heap.live_in(POOL) == checkpoint
    assert home.account.held == held and home.heap.live_bytes != before
    for block in set(new) - set(kept):
        with pytest.raises(tem.InvalidArgument, match="no live block"):
            home.heap.free(block)
    for block in kept:
        home.heap.free(block)
    home.heap.release_pool(POOL)


@pytest.mark.parametrize("freed", [False, True])
def test_a_restore_under_another_streams_use_is_refused_and_changes_nothing(
    home: Home, rung: Rung, freed: bool
) -> None:
    reader = rung.stream()
    with home.pool(POOL):
        blocks = [home.heap.allocate(n, 0) for n in (512, 512, G)]
    checkpoint = home.heap.live_in(POOL)
    home.heap.free(blocks[0])
    for block in blocks[1:]:
        home.heap.record_stream(block, reader.handle)
    reader.submit()
    if freed:
        for block in blocks[1:]:
            home.heap.free(block)
    before = home.heap.segments(), home.heap.live_in(POOL)
    what = "blocks that were freed" if freed else "live blocks"
    with pytest.raises(tem.InvalidArgument, match=rf"pool \(1, 0\) cannot be restored: .* use {what}"):
        home.heap.restore(POOL, checkpoint)
    assert (home.heap.segments(), home.heap.live_in(POOL)) == before
    reader.complete()
    if not freed:
        for block in blocks[1:]:
            home.heap.free(block)
    home.heap.restore(POOL, checkpoint)  # the streams have passed: nothing else need be called first
    assert home.heap.live_in(POOL) == checkpoint
    for block in blocks:
        home.heap.free(block)
    home.heap.release_pool(POOL)


def test_a_checkpoint_of_memory_that_the_pool_does_not_hold_is_refused_and_changes_nothing(
    home: Home,
) -> None:
    shared = home.heap.allocate(G, 0)
    with home.pool(POOL):
        own = home.heap.allocate(G, 0)
    before = home.heap.live_in(POOL)
    for address, why in ((shared, "that the pool does not hold"), (0x1000, "not of this heap")):
        with pytest.raises(tem.InvalidArgument, match=why):
            home.heap.restore(POOL, [(address, G, G, 0, False, 0)])
        assert home.heap.live_in(POOL) == before
    for block in (shared, own):
        home.heap.free(block)
    home.heap.release_pool(POOL)


def test_a_checkpoint_that_no_malloc_made_is_refused_and_changes_nothing(home: Home) -> None:
    with home.pool(POOL):
        blocks = [home.heap.allocate(n, 0) for n in (512, 512, 40 * KiB, G)]
    checkpoint = home.heap.live_in(POOL)
    slabbed, _, small, large = checkpoint
    for bad, why in (
        ((slabbed[0] + 16, *slabbed[1:]), "no malloc made"),  # within a block
        ((slabbed[0] + 64 * KiB, *slabbed[1:]), "no malloc made"),  # behind its slab
        ((slabbed[0], 500, *slabbed[2:]), "no malloc made"),  # of no size class
        ((slabbed[0], 512, 513, *slabbed[3:]), "no malloc made"),  # smaller than what was asked for
        ((small[0], 0, *small[2:]), "no malloc made"),
        ((small[0], small[1] + 1, *small[2:]), "no malloc made"),
        ((*large[:4], True, 0), "no malloc made"),  # in the other region
        ((small[0] + 4 * KiB, *small[1:]), "overlap"),
        (large, "overlap"),  # twice
    ):
        with pytest.raises(tem.InvalidArgument, match=why):
            home.heap.restore(POOL, [*checkpoint, bad])
        assert home.heap.live_in(POOL) == checkpoint
    home.heap.restore(POOL, checkpoint)
    for block in blocks:
        home.heap.free(block)
    home.heap.release_pool(POOL)
