"""The reserve: bytes that are never leased, and warm extents between its marks."""

from __future__ import annotations

import pytest

from tests.arena.watch import MiB, assert_balanced, books, calls, comes_true, filled, kept_idle
from tests.rungs import FakeRung, Rung
from torch_elastic_mem.errors import InvalidArgument, OutOfMemory


def test_bytes_below_the_lower_mark_are_never_leased(rung: Rung) -> None:
    arena = rung.arena(16 * MiB, reserve=(4 * MiB, 4 * MiB))
    account = arena.account("critical", "critical")
    assert account.room() == arena.snapshot().free == 12 * MiB
    memory = account.range(16 * MiB)
    with pytest.raises(OutOfMemory, match="more than all the arena may lease, 12 MiB"):
        memory.grow(14 * MiB)
    memory.grow(12 * MiB)
    assert arena.snapshot().created == 12 * MiB
    with pytest.raises(OutOfMemory):
        memory.grow(2 * MiB)


def test_the_arena_fills_its_reserve_by_itself(rung: Rung) -> None:
    arena = rung.arena(32 * MiB, reserve=(2 * MiB, 10 * MiB))
    assert comes_true(lambda: arena.snapshot().spare == 8 * MiB)
    account = arena.account("a")
    memory = account.range(32 * MiB)
    memory.grow(8 * MiB)
    assert comes_true(lambda: arena.snapshot().spare == 8 * MiB), "and again after a growth used it"
    assert_balanced(arena)
    assert arena.snapshot().free == 22 * MiB, "warm extents are free to lease"


def test_warm_extents_never_keep_a_lease_from_being_used(rung: Rung) -> None:
    arena = rung.arena(16 * MiB, reserve=(0, 8 * MiB))
    arena.refill()
    memory = filled(arena.account("a"), 16 * MiB)
    assert memory.mapped == 16 * MiB
    assert arena.snapshot().created == 16 * MiB
    assert arena.snapshot().spare == 0


def test_what_comes_back_refills_the_reserve_and_the_rest_goes_to_the_device(rung: Rung) -> None:
    arena = rung.arena(32 * MiB, reserve=(0, 8 * MiB))
    memory = filled(arena.account("a"), 32 * MiB)
    memory.shrink(32 * MiB)
    assert comes_true(lambda: arena.snapshot().spare == 8 * MiB)
    assert comes_true(lambda: arena.snapshot().created == 8 * MiB)


def test_marks_move_at_run_time(rung: Rung) -> None:
    arena = rung.arena(32 * MiB)
    account = arena.account("a")
    assert arena.snapshot().spare == 0
    assert arena.set_reserve(4 * MiB, 12 * MiB) == 0
    assert comes_true(lambda: arena.snapshot().spare == 8 * MiB)
    assert account.room() == 28 * MiB
    assert arena.set_reserve(4 * MiB, 6 * MiB) == 0
    assert comes_true(lambda: arena.snapshot().spare <= 2 * MiB)
    arena.set_reserve(0, 0)
    assert comes_true(lambda: arena.snapshot().created == 0)


def test_a_raised_lower_mark_makes_accounts_yield(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    idle = kept_idle(arena.account("a"), 16 * MiB)
    assert arena.set_reserve(6 * MiB, 6 * MiB) == 0
    assert idle.resident == 10 * MiB


@pytest.mark.rungs("host")
@pytest.mark.rungs("fake")  # a second device: not every machine with a GPU has one
@pytest.mark.parametrize("marks", [(4, 2), (0, 16), (16, 16), (-1, 4), (0, 2**64)])
def test_marks_that_cannot_be_right_change_nothing(rung: Rung, marks: tuple[int, int]) -> None:
    arena = rung.arena(16 * MiB)
    low, high = (mark * MiB for mark in marks)
    before = books(rung, arena)
    with pytest.raises(InvalidArgument):
        arena.set_reserve(low, high)
    with pytest.raises(InvalidArgument):
        rung.arena(16 * MiB, reserve=(low, high), device=rung.device if rung.name == "host" else "cuda:1")
    assert books(rung, arena) == before


@pytest.mark.rungs("fake")
def test_a_growth_from_warm_extents_creates_nothing(rung: FakeRung) -> None:
    arena = rung.arena(64 * MiB, reserve=(0, 16 * MiB))
    arena.refill()
    memory = arena.account("a").range(16 * MiB)
    assert comes_true(lambda: arena.snapshot().spare == 16 * MiB)
    assert rung.live()[0] == rung.before[0] + 1
    before = calls(rung, "cuMemMap")
    memory.grow(16 * MiB)
    assert calls(rung, "cuMemMap") == before + 1
    assert memory.resident == 16 * MiB


@pytest.mark.rungs("fake")
def test_the_default_reserve_of_a_small_arena_is_a_small_part_of_it(rung: FakeRung) -> None:
    import torch_elastic_mem as tem

    arena = tem.Arena("cuda", capacity=64 * MiB)
    now = arena.snapshot()
    assert (now.reserve_low, now.reserve_high) == (MiB, 4 * MiB)
    arena.close()


@pytest.mark.rungs("fake")
def test_without_a_capacity_an_arena_shares_what_is_free_on_the_device(rung: FakeRung) -> None:
    import torch_elastic_mem as tem

    arena = tem.Arena("cuda:1", reserve=(0, 0))
    assert arena.capacity == 1 << 30
    arena.close()
