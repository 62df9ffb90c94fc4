"""Limits that the broker changes: they take effect, at once or as soon as what is held can go."""

from __future__ import annotations

import threading
from functools import partial

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
        if len(attempts) > 2:
            memory.shrink(nbytes)

    account.on_reclaim(pause, "pause")
    broker.set_limits(number, "training", Limits(0, max=4 * MiB))
    assert comes_true(lambda: account.held == 4 * MiB)
    assert attempts == [12 * MiB] * 3


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
    broker.set_limits(number, "training", Limits(0, max=4 * MiB))
    # Reports go on meanwhile.
    other, other_number = opened("other")
    kept = []
    for extents in (1, 2, 3):
        kept.append(other.range("2MiB", extent="2MiB"))
        kept[-1].grow("2MiB")
        reported = Report(other_number, 0, extents * 2 * MiB, 0)
        assert comes_true(partial(lambda wanted: wanted in broker.got(Report), reported))
    assert attempts == [12 * MiB]
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
