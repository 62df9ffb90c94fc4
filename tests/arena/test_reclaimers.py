"""Callbacks that misbehave: the demand that ran them ends well or with a clear refusal, and nobody hangs."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest

from tests.arena.watch import MiB, Pair, assert_balanced, books, filled
from tests.rungs import Rung
from torch_elastic_mem.elastic_range import ElasticRange
from torch_elastic_mem.errors import ClosedError, OutOfMemory

pytestmark = pytest.mark.timeout(30)


def test_one_that_raises_is_reported_and_the_next_is_asked(
    rung: Rung, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[tuple[str, object]] = []

    def report(unraisable: Any) -> None:
        reported.append((str(unraisable.exc_value), unraisable.object))

    pair = Pair(rung)

    def fail(nbytes: int, timeout: float) -> None:
        raise ValueError("a tenant's mistake")

    pair.training.on_reclaim(fail)
    pair.training.on_reclaim(pair.give, rung="spill")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "unraisablehook", report)
        pair.new.grow(4 * MiB)
    assert reported == [("a tenant's mistake", fail)]
    assert [(record.rung, record.given) for record in pair.arena.yields()] == [
        ("evict", 0),
        ("spill", 4 * MiB),
    ]


def test_what_counts_is_what_came_back_and_not_what_was_answered(rung: Rung) -> None:
    pair = Pair(rung)
    pair.training.on_reclaim(lambda nbytes, timeout: nbytes)
    with pytest.raises(OutOfMemory):
        pair.new.grow(4 * MiB)
    assert pair.training.held == 16 * MiB


def test_one_is_told_how_much_and_how_long(rung: Rung) -> None:
    pair = Pair(rung, timeout=0.5)
    told: list[tuple[int, float]] = []
    pair.training.on_reclaim(lambda nbytes, timeout: told.append((nbytes, timeout)))
    with pytest.raises(OutOfMemory):
        pair.new.grow(6 * MiB)
    with pytest.raises(OutOfMemory):
        pair.new.grow(2 * MiB, timeout=5.0)
    assert [nbytes for nbytes, _ in told] == [6 * MiB, 2 * MiB]
    assert 0.3 < told[0][1] <= 0.5 and 4.5 < told[1][1] <= 5.0


def test_one_may_wait_for_the_tenants_own_thread(rung: Rung) -> None:
    pair = Pair(rung, timeout=5.0)
    wanted, done = threading.Event(), threading.Event()

    def step() -> None:
        wanted.wait()
        pair.old.shrink(4 * MiB)
        done.set()

    trainer = threading.Thread(target=step)
    trainer.start()

    def reclaim(nbytes: int, timeout: float) -> None:
        wanted.set()
        done.wait(timeout)

    pair.training.on_reclaim(reclaim)
    pair.new.grow(4 * MiB)
    trainer.join()
    assert pair.training.held == 12 * MiB


def test_one_that_blocks_beyond_its_time_delays_only_its_own_demand(rung: Rung) -> None:
    pair = Pair(rung, timeout=0.1)
    others: list[int] = []
    ended = threading.Event()

    def block(nbytes: int, timeout: float) -> None:
        time.sleep(0.4)
        ended.set()

    pair.training.on_reclaim(block)
    pair.training.on_reclaim(lambda nbytes, timeout: others.append(nbytes), rung="pause")
    before = books(rung, pair.arena)
    with pytest.raises(OutOfMemory):
        pair.new.grow(4 * MiB)
    assert ended.is_set()
    assert others == [], "its time was over"
    assert books(rung, pair.arena) == before


def test_the_arena_stays_usable_while_one_blocks(rung: Rung) -> None:
    pair = Pair(rung, timeout=5.0)
    entered, leave = threading.Event(), threading.Event()

    def block(nbytes: int, timeout: float) -> None:
        entered.set()
        leave.wait(timeout)
        pair.give(nbytes, timeout)

    pair.training.on_reclaim(block)
    demand = threading.Thread(target=pair.new.grow, args=(4 * MiB,))
    demand.start()
    assert entered.wait(5)
    pair.old.shrink(2 * MiB)
    assert pair.training.room() == 0, "what comes free is kept for the higher demand that waits"
    assert pair.arena.snapshot().free == 2 * MiB
    leave.set()
    demand.join()
    assert (pair.training.held, pair.serving.held) == (10 * MiB, 4 * MiB)


def test_one_may_close_its_own_account(rung: Rung) -> None:
    pair = Pair(rung)

    def leave(nbytes: int, timeout: float) -> None:
        pair.old.close()
        pair.training.close()

    pair.training.on_reclaim(leave)
    pair.new.grow(16 * MiB)
    assert [account.name for account in pair.arena.snapshot().accounts] == ["serving"]
    assert_balanced(pair.arena)


def test_one_that_closes_the_demanders_account_ends_the_demand(rung: Rung) -> None:
    pair = Pair(rung)

    def hostile(nbytes: int, timeout: float) -> None:
        pair.old.shrink(2 * MiB)
        pair.new.close()
        pair.serving.close()

    pair.training.on_reclaim(hostile)
    with pytest.raises(ClosedError):
        pair.new.grow(4 * MiB)
    assert pair.training.room() == 2 * MiB, "nothing is kept for a demand that is gone"
    pair.old.grow(2 * MiB)


def test_one_may_use_the_arena_from_inside(rung: Rung) -> None:
    pair = Pair(rung)
    spare = pair.training.range(4 * MiB, keep=4 * MiB)

    def busy(nbytes: int, timeout: float) -> None:
        pair.old.shrink(4 * MiB)
        spare.grow(2 * MiB, timeout=0.0) if pair.training.room() else None
        pair.training.trim()
        pair.arena.collect()
        pair.training.set_limits(low=2 * MiB)
        pair.arena.snapshot()
        pair.arena.account("visitor", "idle").close()
        pair.old.shrink(4 * MiB)

    pair.training.on_reclaim(busy)
    pair.new.grow(8 * MiB)
    assert pair.serving.held == 8 * MiB
    assert_balanced(pair.arena)


def test_one_that_grows_waits_behind_the_demand_it_serves(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    idle, training = arena.account("idle", "idle"), arena.account("training", "training")
    old, cache = filled(idle, 4 * MiB), filled(training, 12 * MiB)
    scratch = training.range(4 * MiB)
    refused: list[str] = []

    def spill(nbytes: int, timeout: float) -> None:
        with pytest.raises(OutOfMemory) as error:
            scratch.grow(2 * MiB)
        refused.append(str(error.value))
        cache.shrink(nbytes)

    idle.on_reclaim(lambda nbytes, timeout: old.shrink(min(nbytes, old.mapped)), rung="pause")
    training.on_reclaim(spill)
    new = filled(arena.account("serving", "serving"), 8 * MiB)
    assert new.mapped == 8 * MiB and len(refused) == 1
    assert (old.mapped, cache.mapped, scratch.mapped) == (0, 8 * MiB, 0)
    assert_balanced(arena)


def test_several_demands_may_run_one_at_once(rung: Rung) -> None:
    pair = Pair(rung, timeout=5.0)
    together = threading.Barrier(2)
    lock = threading.Lock()

    def give(nbytes: int, timeout: float) -> None:
        together.wait(timeout)
        with lock:
            pair.old.shrink(nbytes)

    pair.training.on_reclaim(give)
    other = pair.arena.account("other", "critical")
    ranges: list[ElasticRange] = [pair.new, other.range(4 * MiB)]
    threads = [threading.Thread(target=memory.grow, args=(4 * MiB,)) for memory in ranges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [memory.mapped for memory in ranges] == [4 * MiB, 4 * MiB]
    assert_balanced(pair.arena)


@pytest.mark.parametrize(("held", "rungs"), [(6, ["shrink"]), (2, ["shrink", "pause"])])
def test_a_peer_is_paused_only_for_one_that_has_less_than_half_of_its_share(
    rung: Rung, held: int, rungs: list[str]
) -> None:
    arena = rung.arena(16 * MiB)
    peer, demander = arena.account("peer", "training"), arena.account("demander", "training")
    lent = peer.range(16 * MiB)
    lent.grow((16 - held) * MiB)
    memory = demander.range(16 * MiB)
    memory.grow(held * MiB)
    asked: list[str] = []
    for name in ("shrink", "pause"):
        peer.on_reclaim(lambda nbytes, timeout, name=name: asked.append(name), rung=name)
    with pytest.raises(OutOfMemory):
        memory.grow(2 * MiB)
    assert asked == rungs
