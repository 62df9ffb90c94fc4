"""What a program that allocates and frees the same in turn costs: no driver call, and no fence too late."""

from __future__ import annotations

import pytest

from tests.alloc.home import Home
from tests.alloc.mirror import G, KiB
from tests.rungs import FakeRung, Rung

SIZES = [512, 5000, 32 * KiB, 200 * KiB, G, 3 * G + 512 * KiB]


def turn(home: Home, nbytes: int, count: int, stream: int = 0) -> None:
    for _ in range(count):
        home.heap.free(home.heap.allocate(nbytes, stream))


@pytest.mark.rungs("fake")
@pytest.mark.parametrize("nbytes", SIZES)
def test_the_same_size_allocated_and_freed_in_turn_makes_no_driver_calls(rung: FakeRung, nbytes: int) -> None:
    home = Home(rung)
    turn(home, nbytes, 3)
    rung.fail_nth(0)
    turn(home, nbytes, 100)
    assert rung.calls() == 0
    home.close()


@pytest.mark.rungs("fake")
@pytest.mark.parametrize("sizes", [(G, 2 * G), (512, 200 * KiB, 3 * G)])
def test_a_row_of_sizes_that_comes_again_makes_few_driver_calls(
    rung: FakeRung, sizes: tuple[int, ...]
) -> None:
    home = Home(rung)

    def step() -> None:
        for block in [home.heap.allocate(nbytes, 0) for nbytes in sizes]:
            home.heap.free(block)

    for _ in range(5):
        step()
    rung.fail_nth(0)
    for _ in range(100):
        step()
    assert rung.calls() <= 2 * 100 * len(sizes)
    home.close()


@pytest.mark.rungs("fake")
def test_blocks_that_leave_no_extent_idle_make_no_driver_calls(rung: FakeRung) -> None:
    home = Home(rung)
    keep = [home.heap.allocate(nbytes, 0) for nbytes in (512, G // 2 + 600 * KiB)]
    turn(home, 300 * KiB, 1)
    rung.fail_nth(0)
    for nbytes in (512, 4096, 300 * KiB, 40 * KiB, 900 * KiB):
        turn(home, nbytes, 20)
    assert rung.calls() == 0
    for block in keep:
        home.heap.free(block)
    home.close()


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_first_free_is_marked_at_its_moment(home: Home, rung: Rung, nbytes: int) -> None:
    mine = rung.stream()
    turn(home, nbytes, 1, mine.handle)
    mine.submit()  # what comes after the free holds nothing up
    assert home.account.trim() == home_bytes(nbytes)
    mine.complete()


@pytest.mark.parametrize("nbytes", SIZES)
def test_the_memory_of_hot_blocks_waits_for_their_last_free(home: Home, rung: Rung, nbytes: int) -> None:
    mine = rung.stream()
    turn(home, nbytes, 9, mine.handle)
    mine.submit()
    turn(home, nbytes, 1, mine.handle)  # behind the work that was submitted
    assert home.account.trim() == 0
    mine.complete()
    assert home.account.trim() == home_bytes(nbytes)
    assert home.account.held == 0


def home_bytes(nbytes: int) -> int:
    return -(-nbytes // G) * G


def test_a_hot_block_is_its_streams_alone(home: Home, rung: Rung) -> None:
    mine, other = rung.stream(), rung.stream()
    turn(home, G, 4, mine.handle)
    block = home.heap.allocate(G, mine.handle)
    home.heap.free(block)
    elsewhere = home.heap.allocate(G, other.handle)
    assert elsewhere != block
    assert home.heap.allocate(G, mine.handle) == block
    for one in (block, elsewhere):
        home.heap.free(one)


def test_hot_blocks_join_when_a_larger_one_is_wanted(home: Home) -> None:
    turn(home, G, 8)
    blocks = [home.heap.allocate(G, 0) for _ in range(6)]
    for block in blocks:
        home.heap.free(block)
    held = home.account.held
    assert home.heap.allocate(6 * G, 0) == min(blocks)
    assert home.account.held == held == 6 * G
    home.heap.free(min(blocks))
