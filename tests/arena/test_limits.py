"""Limits, capacity and admission, changed while everything runs."""

from __future__ import annotations

import threading
import time

import pytest

import torch_elastic_mem as tem
from tests.arena.watch import MiB, assert_balanced, books, calls, comes_true, filled, kept_idle
from tests.rungs import FakeRung, Rung
from torch_elastic_mem.errors import AdmissionError, ClosedError, InvalidArgument, OutOfMemory


def test_a_min_that_does_not_fit_is_not_admitted(rung: Rung) -> None:
    arena = rung.arena(16 * MiB, reserve=(2 * MiB, 2 * MiB))
    first = arena.account("first", min=10 * MiB)
    with pytest.raises(AdmissionError) as refused:
        arena.account("second", min=6 * MiB)
    for word in ("'second' asks for min 6 MiB", "4 MiB of 14 MiB is not promised yet", "first holds 0 B"):
        assert word in str(refused.value)
    second = arena.account("second", min=4 * MiB)
    with pytest.raises(AdmissionError):
        second.set_limits(min=5 * MiB)
    assert second.limits.min == 4 * MiB
    first.close()
    second.set_limits(min=14 * MiB)


def test_a_capacity_below_what_is_promised_is_refused(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    account = arena.account("a", min=10 * MiB)
    before = books(rung, arena)
    with pytest.raises(AdmissionError, match="asks for min 10 MiB"):
        arena.set_capacity(8 * MiB)
    with pytest.raises(AdmissionError):
        arena.set_reserve(8 * MiB, 8 * MiB)
    assert (books(rung, arena), arena.capacity, account.room()) == (before, 16 * MiB, 16 * MiB)


def test_max_is_an_accounts_own_out_of_memory(rung: Rung) -> None:
    account = rung.arena(16 * MiB).account("a", max=6 * MiB)
    memory = account.range(16 * MiB)
    memory.grow(4 * MiB)
    assert account.room() == 2 * MiB
    with pytest.raises(OutOfMemory, match="max is 6 MiB"):
        memory.grow(4 * MiB)
    account.set_limits(max=8 * MiB)
    memory.grow(4 * MiB)


def test_at_max_own_idle_memory_makes_way(rung: Rung) -> None:
    account = rung.arena(16 * MiB).account("a", max=6 * MiB)
    idle = kept_idle(account, 6 * MiB)
    memory = filled(account, 4 * MiB)
    assert (memory.mapped, idle.resident, account.held) == (4 * MiB, 2 * MiB, 6 * MiB)


def test_a_lowered_max_takes_effect_on_an_idle_account(rung: Rung) -> None:
    account = rung.arena(16 * MiB).account("a")
    idle = kept_idle(account, 12 * MiB)
    assert account.set_limits(max=4 * MiB) == 0
    assert account.held == idle.resident == 4 * MiB


def test_a_lowered_max_asks_the_accounts_own_reclaimers_and_says_what_is_left(rung: Rung) -> None:
    account = rung.arena(16 * MiB).account("a")
    memory = filled(account, 12 * MiB)
    asked: list[int] = []

    def give(nbytes: int, timeout: float) -> None:
        asked.append(nbytes)
        memory.shrink(4 * MiB)

    account.on_reclaim(give, rung="pause")
    assert account.set_limits(max=4 * MiB, timeout=0.2) == 4 * MiB
    assert (asked, account.held, account.limits.max) == ([8 * MiB], 8 * MiB, 4 * MiB)
    assert account.room() == 0
    memory.shrink(8 * MiB)
    memory.grow(4 * MiB)


def test_a_lowered_high_trims_and_evicts_but_pauses_nobody(rung: Rung) -> None:
    account = rung.arena(16 * MiB).account("a")
    cache, live = filled(account, 4 * MiB), filled(account, 8 * MiB)
    dear: list[int] = []
    account.on_reclaim(lambda nbytes, timeout: cache.shrink(4 * MiB), rung="evict")
    account.on_reclaim(lambda nbytes, timeout: dear.append(nbytes), rung="pause")
    assert account.set_limits(high=4 * MiB, timeout=0.2) == 0
    assert (account.held, live.mapped, dear) == (8 * MiB, 8 * MiB, [])


def test_above_high_an_account_makes_nobody_yield_but_may_use_what_is_free(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    serving, training = (
        arena.account("serving", "serving", high=4 * MiB),
        arena.account("training", "training"),
    )
    idle = kept_idle(training, 8 * MiB)
    new = serving.range(16 * MiB)
    new.grow(8 * MiB)
    assert (new.mapped, idle.resident) == (8 * MiB, 8 * MiB)
    with pytest.raises(OutOfMemory):
        new.grow(2 * MiB)
    assert idle.resident == 8 * MiB


def test_what_is_above_high_goes_first_even_to_a_lower_class(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    serving = arena.account("serving", "serving")
    idle = kept_idle(serving, 16 * MiB)
    serving.set_limits(high=16 * MiB)
    training = arena.account("training", "training").range(8 * MiB)
    with pytest.raises(OutOfMemory):
        training.grow(4 * MiB)
    serving.set_limits(high=12 * MiB)
    training.grow(4 * MiB)
    assert idle.resident == 12 * MiB


def test_low_is_taken_only_when_nothing_else_is_left(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    first = arena.account("first", "idle", low=6 * MiB)
    second = arena.account("second", "training")
    protected, plain = kept_idle(first, 8 * MiB), kept_idle(second, 8 * MiB)
    new = arena.account("serving", "serving").range(16 * MiB)
    new.grow(10 * MiB)
    assert (protected.resident, plain.resident) == (6 * MiB, 0)
    new.grow(2 * MiB)
    assert protected.resident == 4 * MiB


def test_weight_moves_a_share_at_run_time(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    first, second = arena.account("first"), arena.account("second")
    idle = kept_idle(first, 16 * MiB)
    new = second.range(16 * MiB)
    with pytest.raises(OutOfMemory):
        new.grow(10 * MiB)
    second.set_limits(weight=3.0)
    new.grow(12 * MiB)
    assert (idle.resident, new.mapped) == (4 * MiB, 12 * MiB)


def test_a_lowered_capacity_is_paid_by_the_lowest_class_first(rung: Rung) -> None:
    arena = rung.arena(24 * MiB)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    cheap, dear = kept_idle(training, 8 * MiB), kept_idle(serving, 8 * MiB)
    assert arena.set_capacity(12 * MiB) == 0
    assert (cheap.resident, dear.resident) == (4 * MiB, 8 * MiB)
    assert arena.set_capacity(4 * MiB) == 0
    assert (cheap.resident, dear.resident) == (0, 4 * MiB)
    assert {record.demander for record in arena.yields()} == {"capacity"}
    assert arena.snapshot().created <= 4 * MiB
    assert_balanced(arena)


def test_a_capacity_that_nobody_makes_room_for_stops_grants_until_it_has_come_back(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    account = arena.account("a")
    memory = filled(account, 12 * MiB)
    assert arena.set_capacity(8 * MiB, timeout=0.1) == 4 * MiB
    assert (account.room(), arena.snapshot().free) == (0, 0)
    with pytest.raises(OutOfMemory):
        memory.grow(2 * MiB, timeout=0.0) if memory.mapped < 12 * MiB else filled(account, 2 * MiB)
    memory.shrink(6 * MiB)
    assert account.room() == 2 * MiB


def test_a_capacity_may_be_raised_again(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    account = arena.account("a")
    arena.set_capacity(4 * MiB)
    assert arena.set_capacity(16 * MiB) == 0
    memory = filled(account, 16 * MiB)
    assert memory.mapped == 16 * MiB


@pytest.mark.rungs("fake")
def test_a_lowered_capacity_costs_warm_extents_before_it_costs_the_device(rung: FakeRung) -> None:
    arena = rung.arena(32 * MiB, reserve=(0, 16 * MiB))
    arena.refill()
    memory = filled(arena.account("a"), 8 * MiB)
    assert arena.set_capacity("20MiB") == 0
    assert comes_true(lambda: arena.snapshot().created <= 20 * MiB)
    assert memory.mapped == 8 * MiB and calls(rung, "cuMemRelease") > 0


def test_wait_ends_when_there_is_room(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    first, second = arena.account("first"), arena.account("second")
    memory = filled(first, 16 * MiB)
    assert second.wait(0, 0.0) and not second.wait(2 * MiB, 0.0)
    assert not second.wait(2 * MiB, 0.15)
    for timeout in (10.0, float("inf"), 10**12):
        timer = threading.Timer(0.05, memory.shrink, args=(2 * MiB,))
        timer.start()
        assert second.wait(2 * MiB, timeout)
        timer.join()
        memory.grow(2 * MiB)


def test_wait_does_not_hold_the_interpreter_and_ends_with_its_account(rung: Rung) -> None:
    arena = rung.arena(4 * MiB)
    first, second = arena.account("first"), arena.account("second")
    memory = filled(first, 4 * MiB)
    outcome: list[object] = []

    def wait() -> None:
        try:
            outcome.append(second.wait(2 * MiB, 10.0))
        except ClosedError as error:
            outcome.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.02)
    second.close()
    thread.join(5)
    assert outcome == [ClosedError] and memory.mapped == 4 * MiB


@pytest.mark.parametrize(
    "limits",
    [
        {"min": 4, "max": 2},
        {"min": 4, "low": 2},
        {"low": 4, "max": 2},
        {"high": 4, "max": 2},
        {"min": 4, "high": 2},
        {"low": 4, "high": 2},
        {"min": -1},
        {"max": 2**64},
        {"weight": 0.0},
        {"weight": float("nan")},
        {"weight": float("inf")},
        {"high": "many"},
    ],
)
def test_limits_that_contradict_each_other_change_nothing(rung: Rung, limits: dict[str, object]) -> None:
    arena = rung.arena()
    account = arena.account("a", min=1, weight=2.0)
    before = account.limits
    with pytest.raises(InvalidArgument):
        account.set_limits(**limits)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        arena.account("b", **limits)  # type: ignore[arg-type]
    assert account.limits == before
    assert [(a.name, a.min, a.weight) for a in arena.snapshot().accounts] == [("a", 1, 2.0)]


def test_an_account_takes_the_limits_of_its_class(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    mine = tem.PriorityClass("mine", 7, min=2 * MiB, low=3 * MiB, high=4 * MiB, max=5 * MiB, weight=2.0)
    arena.account("a", mine, max=6 * MiB)
    (seen,) = arena.snapshot().accounts
    assert (seen.priority, seen.value, seen.min, seen.low, seen.high, seen.max, seen.weight) == (
        "mine",
        7,
        *(n * MiB for n in (2, 3, 4, 6)),
        2.0,
    )


def test_a_limit_can_be_lifted_by_its_cgroup_word(rung: Rung) -> None:
    account = rung.arena(32 * MiB).account("a", high=4 * MiB, max=8 * MiB)
    memory = account.range(32 * MiB)
    with pytest.raises(OutOfMemory):
        memory.grow(12 * MiB)
    account.set_limits(high="max", max="max")
    assert (account.limits.high, account.limits.max) == (None, None)
    memory.grow(12 * MiB)
