"""How memory moves between accounts: what is idle at once, then reclaimers from cheap to dear."""

from __future__ import annotations

import threading
import time

import pytest

import torch_elastic_mem as tem
from tests.arena.watch import EXTENT, MiB, assert_balanced, books, filled, kept_idle
from tests.rungs import Rung
from torch_elastic_mem.elastic_range import ElasticRange
from torch_elastic_mem.errors import InvalidArgument, OutOfMemory

RUNGS = ("pause", "shrink", "spill", "evict")  # dear to cheap, to register them in the wrong order


def evicting(account: tem.Account, memory: ElasticRange, rung: str = "evict") -> list[int]:
    """Registers a reclaimer that gives what it is asked for. Returns the list of what it was asked."""
    asked: list[int] = []

    def give(nbytes: int, timeout: float) -> None:
        asked.append(nbytes)
        if memory.mapped:
            memory.shrink(min(memory.mapped, nbytes))

    account.on_reclaim(give, rung=rung)
    return asked


def test_idle_memory_of_a_lower_class_goes_at_once_and_nobody_is_asked(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    old = kept_idle(training, 16 * MiB)
    asked = evicting(training, old)
    new = filled(serving, 10 * MiB)
    assert (training.held, new.mapped, asked) == (6 * MiB, 10 * MiB, [])
    assert {record.rung for record in arena.yields()} == {"trim"}


def test_records_and_counters_say_who_gave_what_to_whom(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    idle = kept_idle(training, 8 * MiB)
    cache = filled(training, 8 * MiB)
    evicting(training, cache)
    start = time.monotonic_ns()
    new = serving.range(16 * MiB)
    new.grow(12 * MiB)
    records = arena.yields()
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert {(record.demander, record.victim) for record in records} == {("serving", "training")}
    assert [record.rung for record in records][-1] == "evict"
    assert sum(record.given for record in records) == 12 * MiB
    assert all(record.given >= record.asked > 0 for record in records)
    assert all(start <= record.start_ns <= time.monotonic_ns() for record in records)
    assert all(0 <= record.duration_ns < 10**9 for record in records)
    accounts = {account.name: account for account in arena.snapshot().accounts}
    assert (accounts["training"].given, accounts["training"].taken) == (12 * MiB, 0)
    assert (accounts["serving"].given, accounts["serving"].taken) == (0, 12 * MiB)
    assert (accounts["training"].yields, accounts["serving"].yields) == (len(records), 0)
    assert arena.yields(since=records[-1].seq) == []
    assert arena.yields(since=records[0].seq) == records[1:]
    assert idle.resident == 0


@pytest.mark.parametrize("kept", [False, True])
def test_what_was_let_go_of_behind_a_fence_is_on_record_once(rung: Rung, kept: bool) -> None:
    arena = rung.arena(8 * MiB)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    cache = filled(training, 8 * MiB, keep=8 * MiB if kept else 0)
    stream = rung.stream()
    stream.submit()

    def give(nbytes: int, timeout: float) -> None:
        cache.shrink(nbytes, stream=stream.handle)
        threading.Timer(0.02, stream.complete).start()

    training.on_reclaim(give)
    new = filled(serving, 4 * MiB)
    given = {record.rung: record.given for record in arena.yields()}
    # What is kept is taken from it once its fence has passed.
    assert given == ({"evict": 0, "trim": 4 * MiB} if kept else {"evict": 4 * MiB})
    accounts = {account.name: account for account in arena.snapshot().accounts}
    assert accounts["training"].given == accounts["serving"].taken == new.mapped == 4 * MiB


def test_reclaimers_are_asked_by_class_then_rung_then_who_is_most_above_its_share(rung: Rung) -> None:
    arena = rung.arena(24 * MiB)
    held = {"small": ("idle", 4), "large": ("idle", 12), "training": ("training", 8)}
    order: list[tuple[str, str]] = []
    ranges = []
    for name, (priority, size) in held.items():
        account = arena.account(name, priority)
        ranges.append(filled(account, size * MiB))
        for cost in RUNGS:

            def refuse(nbytes: int, timeout: float, who: tuple[str, str] = (name, cost)) -> None:
                order.append(who)

            account.on_reclaim(refuse, rung=cost)
    new = arena.account("serving", "serving").range(24 * MiB)
    with pytest.raises(OutOfMemory, match="no account that may be asked gave enough"):
        new.grow(24 * MiB)
    cheap_first = RUNGS[::-1]
    expected = [(name, cost) for cost in cheap_first for name in ("large", "small")]
    assert order == [*expected, *(("training", cost) for cost in cheap_first)]


def test_a_dearer_rung_is_not_asked_when_a_cheaper_one_gave_enough(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    training = arena.account("training", "training")
    cache, weights = filled(training, 8 * MiB), filled(training, 8 * MiB)
    spilled = evicting(training, weights, "spill")
    evicted = evicting(training, cache, "evict")
    new = filled(arena.account("serving", "serving"), 8 * MiB)
    assert (evicted, spilled) == ([8 * MiB], [])
    more = filled(arena.account("more", "serving"), 4 * MiB)
    assert spilled == [4 * MiB]
    assert new.mapped + more.mapped == 12 * MiB


def test_a_class_that_has_nothing_to_give_does_not_shield_the_next(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    stuck = filled(arena.account("idle", "idle"), 8 * MiB)
    training = arena.account("training", "training")
    cache = filled(training, 8 * MiB)
    asked = evicting(training, cache)
    new = filled(arena.account("serving", "serving"), 4 * MiB)
    assert (asked, stuck.mapped, new.mapped) == ([4 * MiB], 8 * MiB, 4 * MiB)


def test_a_class_that_gives_only_a_part_does_not_shield_the_next(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    idle, training = arena.account("idle", "idle"), arena.account("training", "training")
    first, second = filled(idle, 8 * MiB), filled(training, 8 * MiB)
    idle.on_reclaim(lambda nbytes, timeout: first.shrink(EXTENT))
    asked = evicting(training, second)
    new = filled(arena.account("serving", "serving"), 8 * MiB)
    assert (first.mapped, asked, new.mapped) == (6 * MiB, [6 * MiB], 8 * MiB)


def test_what_is_idle_in_any_lower_class_goes_before_anybody_is_asked(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    lowest, training = arena.account("idle", "idle"), arena.account("training", "training")
    cache = filled(lowest, 8 * MiB)
    asked = evicting(lowest, cache)
    idle = kept_idle(training, 8 * MiB)
    new = filled(arena.account("serving", "serving"), 8 * MiB)
    assert (asked, cache.mapped, idle.resident, new.mapped) == ([], 8 * MiB, 0, 8 * MiB)


def test_idle_memory_of_a_higher_class_is_not_taken_by_a_lower_demand(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    serving, training = arena.account("serving", "serving"), arena.account("training", "training")
    idle = kept_idle(serving, 16 * MiB)
    asked = evicting(serving, idle)
    memory = training.range(4 * MiB)
    before = books(rung, arena)
    with pytest.raises(OutOfMemory):
        memory.grow(2 * MiB)
    assert (books(rung, arena), asked, arena.yields()) == (before, [], [])


def test_idle_memory_that_is_not_kept_is_anybodys(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    old = filled(arena.account("serving", "serving"), 16 * MiB)
    old.shrink(16 * MiB)
    new = filled(arena.account("training", "training"), 16 * MiB)
    assert new.mapped == 16 * MiB


def test_a_peer_yields_down_to_its_share(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    first, second = arena.account("first"), arena.account("second")
    idle = kept_idle(first, 16 * MiB)
    new = second.range(16 * MiB)
    new.grow(8 * MiB)
    assert (idle.resident, new.mapped) == (8 * MiB, 8 * MiB)
    with pytest.raises(OutOfMemory):
        new.grow(2 * MiB)


def test_min_is_not_crossed_even_where_only_a_whole_extent_could_go(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    training, serving = (
        arena.account("training", "training", min=6 * MiB),
        arena.account("serving", "serving"),
    )
    whole = training.range(8 * MiB, keep=8 * MiB)
    whole.grow(8 * MiB)  # one extent
    whole.shrink(8 * MiB)
    other = filled(arena.account("other", "training"), 8 * MiB, keep=8 * MiB)
    other.shrink(8 * MiB)
    new = serving.range(16 * MiB)
    new.grow(2 * MiB)
    assert training.held == 8 * MiB, "another account's idle extents went instead"
    with pytest.raises(OutOfMemory):
        new.grow(8 * MiB)
    assert training.held == 8 * MiB
    new.grow(6 * MiB)
    assert_balanced(arena)


def test_a_guaranteed_min_is_taken_from_a_higher_class(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    serving = arena.account("serving", "serving")
    training = arena.account("training", "training", min=6 * MiB)
    idle = kept_idle(serving, 16 * MiB)
    memory = training.range(16 * MiB)
    memory.grow(6 * MiB)
    assert (memory.mapped, idle.resident) == (6 * MiB, 10 * MiB)
    with pytest.raises(OutOfMemory):
        memory.grow(2 * MiB)


def test_own_idle_memory_is_used_before_anybody_yields(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    own, others = kept_idle(serving, 8 * MiB), kept_idle(training, 8 * MiB)
    new = filled(serving, 8 * MiB)
    assert (own.resident, others.resident, new.mapped) == (0, 8 * MiB, 8 * MiB)
    assert arena.yields() == []


def test_a_refusal_is_counted_and_says_who_holds_what_and_what_to_do(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    training, serving = arena.account("training", "training", min="4MiB"), arena.account("serving", "serving")
    old = filled(training, 12 * MiB)
    new = serving.range(16 * MiB)
    with pytest.raises(OutOfMemory) as refused:
        new.grow(6 * MiB)
    text = str(refused.value)
    for word in ("'serving' asked for 6 MiB", "4 MiB of 16 MiB is free", "training holds 12 MiB, min 4 MiB"):
        assert word in text
    assert "To go on: " in text
    assert [account.denied for account in arena.snapshot().accounts] == [0, 1]
    assert old.mapped == 12 * MiB


def test_an_impossible_demand_makes_nobody_yield(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    training = arena.account("training", "training")
    serving = arena.account("serving", "serving", high=6 * MiB, max=8 * MiB)
    idle, own = kept_idle(training, 8 * MiB), kept_idle(serving, 6 * MiB)
    new = serving.range(32 * MiB)
    for nbytes, why in ((10 * MiB, "the account's max 8 MiB"), (20 * MiB, "the account's max 8 MiB")):
        with pytest.raises(OutOfMemory, match=why):
            new.grow(nbytes)
    serving.set_limits(max=64 * MiB)
    with pytest.raises(OutOfMemory, match="more than all the arena may lease, 16 MiB"):
        new.grow(20 * MiB)
    assert (idle.resident, own.resident, arena.yields()) == (8 * MiB, 6 * MiB, [])


def test_a_callback_needs_a_known_rung_and_to_be_callable(rung: Rung) -> None:
    account = rung.arena().account("a")
    for bad in ("trim", "revoke", ""):
        with pytest.raises(InvalidArgument, match="evict, spill, shrink, pause"):
            account.on_reclaim(lambda nbytes, timeout: None, rung=bad)
    with pytest.raises(InvalidArgument, match="called as"):
        account.on_reclaim(3)  # type: ignore[arg-type]
