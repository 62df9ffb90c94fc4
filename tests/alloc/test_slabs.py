"""Small blocks: slabs, and the memory that they keep."""

from __future__ import annotations

import pytest

import torch_elastic_mem as tem
from tests.alloc.home import Home
from tests.alloc.mirror import G, KiB, MiB
from tests.rungs import Rung

# Of every slab size and class: bytes of a block, of its slab.
KINDS = [(1, 64 * KiB), (4096, 64 * KiB), (4097, 256 * KiB), (12 * KiB, 256 * KiB), (32 * KiB, 256 * KiB)]


@pytest.mark.parametrize(("nbytes", "slab"), KINDS)
def test_slabs_go_back_when_they_are_empty(home: Home, nbytes: int, slab: int) -> None:
    blocks = [home.heap.allocate(nbytes, 0) for _ in range(400)]
    assert len(set(blocks)) == 400
    held = home.account.held
    for block in blocks:
        home.heap.free(block)
    assert home.account.held == held, "cached"
    assert home.account.trim() == held


@pytest.mark.parametrize(("nbytes", "slab"), KINDS)
def test_one_block_that_stays_holds_one_slab(home: Home, nbytes: int, slab: int) -> None:
    blocks = [home.heap.allocate(nbytes, 0) for _ in range(400)]
    held = home.account.held
    for block in blocks[:200] + blocks[201:]:
        home.heap.free(block)
    assert home.account.trim() == held - G
    rest = [home.heap.allocate(slab, 0) for _ in range(G // slab - 1)]
    assert home.account.held == G, "all but one slab of the extent is free for others"
    for block in (*rest, blocks[200]):
        home.heap.free(block)


@pytest.mark.parametrize(("nbytes", "slab"), KINDS)
def test_a_slabs_blocks_do_not_overlap_and_keep_their_contents(
    home: Home, rung: Rung, nbytes: int, slab: int
) -> None:
    blocks = [home.heap.allocate(nbytes, 0) for _ in range(60)]
    for i, block in enumerate(blocks):
        rung.write(block, bytes([i]))
        rung.write(block + nbytes - 1, bytes([i]))
    for i, block in enumerate(blocks):
        assert rung.read(block, 1) == rung.read(block + nbytes - 1, 1) == bytes([i])
        home.heap.free(block)


def test_a_double_free_inside_a_slab_is_refused_while_its_neighbours_live(home: Home) -> None:
    first, second = home.heap.allocate(600, 0), home.heap.allocate(600, 0)
    home.heap.free(first)
    for call in (home.heap.free, lambda address: home.heap.record_stream(address, 0)):
        with pytest.raises(tem.InvalidArgument, match=f"of {first:#x}, which is no live block"):
            call(first)
    assert home.heap.live_bytes == 1024
    home.heap.free(second)


def test_pointers_into_a_block_and_behind_the_last_one_are_refused(home: Home) -> None:
    nbytes = 12 * KiB  # 21 blocks leave 4 KiB of the slab
    blocks = [home.heap.allocate(nbytes, 0) for _ in range(21)]
    large = home.heap.allocate(3 * G, 0)
    wrong = [blocks[0] + 1, blocks[0] + 512, blocks[-1] + nbytes, large + 64 * KiB, large + G, large + 1]
    for address in wrong:
        with pytest.raises(tem.InvalidArgument, match=f"{address:#x}, which is no live block"):
            home.heap.free(address)
    for block in (*blocks, large):
        home.heap.free(block)


def test_a_block_of_a_slab_that_another_stream_uses_waits_while_others_are_reused(
    home: Home, rung: Rung
) -> None:
    reader = rung.stream()
    shared, plain = home.heap.allocate(2048, 0), home.heap.allocate(2048, 0)
    home.heap.record_stream(shared, reader.handle)
    reader.submit()
    for block in (shared, plain):
        home.heap.free(block)
    assert home.heap.allocate(2048, 0) == plain
    assert home.heap.allocate(2048, 0) not in (plain, shared)
    assert home.heap.stats()["active"]["small"]["current"] == 3
    reader.complete()
    assert home.heap.allocate(2048, 0) == shared
    home.free_all()


def test_the_fence_of_an_idle_slab_is_the_moment_of_its_last_free(home: Home, rung: Rung) -> None:
    mine = rung.stream()
    blocks = [home.heap.allocate(600, mine.handle) for _ in range(3)]
    home.heap.free(blocks[0])
    mine.submit()
    home.heap.free(blocks[2])
    home.heap.free(blocks[1])
    assert home.account.trim() == 0
    mine.complete()
    assert home.account.trim() == G

    for block in [home.heap.allocate(600, mine.handle) for _ in range(3)]:
        home.heap.free(block)
    mine.submit()  # what comes after the last free holds nothing up
    assert home.account.trim() == G
    mine.complete()


def test_what_empty_slabs_keep_is_used_before_the_heap_grows_or_refuses(rung: Rung) -> None:
    home = Home(rung, G)
    blocks = [home.heap.allocate(512, 0)]
    home.heap.free(home.heap.allocate(4096, 0))  # its slab stays for the next one
    blocks += [home.heap.allocate(n, 0) for n in (MiB, MiB - 128 * KiB)]
    blocks.append(home.heap.allocate(64 * KiB, 0))
    assert home.account.held == G
    for block in blocks:
        home.heap.free(block)
    home.close()
