"""Limits that the broker changes: they take effect, at once or as soon as what is held can go."""

from __future__ import annotations

import threading
import time
from functools import partial
from itertools import pairwise

from tests.arena.watch import comes_true
from tests.client.conftest import Opened
from tests.client.scripted import MiB, Scripted
from torch_elastic_mem.broker.protocol import Limits, Report


def test_what_cannot_go_yet_goes_later_though_nobody_asks_again(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("16MiB", extent="2MiB")
    memory.grow("16MiB")
    attempts: list[int] = []

    def pause(nbytes: int, timeout: float) -> None:
        attempts.append(nbytes)
        if len(attempts) > 1:
            memory.shrink(nbytes)

    account.on_reclaim(pause, "pause")
    broker.set_limits(number, "training", Limits(0, max=4 * MiB))
    assert comes_true(lambda: account.held == 4 * MiB)
    assert attempts == [12 * MiB] * 2


def test_who_has_nothing_to_give_is_asked_ever_more_rarely(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("16MiB", extent="2MiB")
    memory.grow("16MiB")
    attempts: list[float] = []
    account.on_reclaim(lambda nbytes, timeout: attempts.append(time.monotonic()), "pause")
    broker.set_limits(number, "training", Limits(0, max=4 * MiB))
    other, _ = opened("other")
    busy = other.range("2MiB", extent="2MiB")
    # Reports are made all the time meanwhile.
    while len(attempts) < 3:
        busy.grow("2MiB")
        busy.shrink("2MiB")
    rests = [after - before for before, after in pairwise(attempts)]
    assert [rest > 0.9 * 2**number for number, rest in enumerate(rests)] == [True] * 2


def test_limits_that_a_process_sets_itself_are_its_own_to_wait_for(opened: Opened, broker: Scripted) -> None:
    account, _ = opened()
    memory = account.range("16MiB", extent="2MiB")
    memory.grow("16MiB")
    attempts: list[int] = []

    def pause(nbytes: int, timeout: float) -> None:
        attempts.append(nbytes)
        # Reports are made meanwhile.
        reports = len(broker.got(Report))
        account.note_blocks(1, 2, 3, 4)
        broker.await_count(Report, reports + 1)
        account.note_blocks(1, 2, 3, 5)
        broker.await_count(Report, reports + 2)
        memory.shrink(nbytes)

    account.on_reclaim(pause, "pause")
    account.set_limits(max="8MiB", timeout=30.0)
    assert (attempts, account.held) == ([8 * MiB], 8 * MiB)


def test_an_attempt_that_takes_long_is_the_only_one(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("16MiB", extent="2MiB")
    memory.grow("16MiB")
    attempts: list[int] = []
    leave = threading.Event()

    def pause(nbytes: int, timeout: float) -> None:
        attempts.append(nbytes)
        leave.wait(30)
        memory.shrink(nbytes)

    account.on_reclaim(pause, "pause")
    for most in (6, 5, 4):
        broker.set_limits(number, "training", Limits(0, max=most * MiB))
    # Reports go on meanwhile.
    other, other_number = opened("other")
    kept = []
    for extents in (1, 2, 3):
        kept.append(other.range("2MiB", extent="2MiB"))
        kept[-1].grow("2MiB")
        reported = Report(other_number, 0, extents * 2 * MiB, 0)
        assert comes_true(partial(lambda wanted: wanted in broker.got(Report), reported))
    assert len(attempts) == 1
    leave.set()
    assert comes_true(lambda: account.held == 4 * MiB)


def test_a_lowered_high_is_met_by_what_is_cheap_alone(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("16MiB", extent="2MiB")
    memory.grow("16MiB")
    asked: list[tuple[str, int]] = []

    def evict(nbytes: int, timeout: float) -> None:
        asked.append(("evict", nbytes))
        memory.shrink("4MiB")

    account.on_reclaim(evict, "evict")
    account.on_reclaim(lambda nbytes, timeout: asked.append(("pause", nbytes)), "pause")
    broker.set_limits(number, "training", Limits(0, high=8 * MiB, max=14 * MiB))
    assert comes_true(lambda: account.held == 8 * MiB)
    assert asked == [("evict", 2 * MiB), ("evict", 4 * MiB)]
