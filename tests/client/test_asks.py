"""What an arena gives when the broker asks, and how it answers."""

from __future__ import annotations

import threading
import time

import torch_elastic_mem as tem
from tests.client.conftest import Opened
from tests.client.scripted import MiB, Scripted
from tests.rungs import Rung
from torch_elastic_mem.broker.protocol import LAST, Demand, Gave, Limits, Message

EVICT, SPILL, PAUSE = 1, 2, 4


def given(answers: list[Gave]) -> int:
    return sum(answer.bytes for answer in answers)


def test_what_is_leased_and_unused_goes_first(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("8MiB")
    memory.grow("2MiB")
    unused = broker.charged[number] - account.held
    assert unused > 0
    assert given(broker.ask(number, unused)) == unused
    assert account.held == 2 * MiB


def test_idle_memory_is_released_by_the_driver_before_it_is_given(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = account.range("32MiB", keep="32MiB", extent="4MiB")
    memory.grow("32MiB")
    memory.shrink("24MiB")
    assert given(broker.ask(number, 16 * MiB)) == 16 * MiB
    assert arena.snapshot().created <= broker.charged[number]
    assert memory.mapped >= 8 * MiB


def test_memory_in_use_is_not_given(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("16MiB")
    memory.grow("16MiB")
    broker.ask(number, 64 * MiB)
    answers = broker.ask(number, 16 * MiB, rung=PAUSE)
    assert given(answers) == 0
    assert answers[-1].flags & LAST
    assert account.held == 16 * MiB


def test_min_is_kept(opened: Opened, broker: Scripted) -> None:
    account, number = opened(min="8MiB")
    memory = account.range("32MiB", keep="32MiB", extent="2MiB")
    memory.grow("32MiB")
    memory.shrink("32MiB")
    broker.ask(number, 64 * MiB)
    assert account.held == 8 * MiB


def test_reclaimers_are_called_in_order_of_cost_up_to_the_rung(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("32MiB", extent="2MiB")
    memory.grow("32MiB")
    broker.ask(number, 64 * MiB)  # what is unused
    called: list[str] = []

    def give(rung: str) -> None:
        called.append(rung)
        memory.shrink("4MiB")

    for rung in ("pause", "evict", "spill"):
        account.on_reclaim(lambda nbytes, timeout, rung=rung: give(rung), rung)
    assert given(broker.ask(number, 4 * MiB, rung=EVICT)) == 4 * MiB
    assert called == ["evict"]
    assert given(broker.ask(number, 8 * MiB, rung=SPILL)) == 8 * MiB
    assert called == ["evict", "evict", "spill"]


def test_an_ask_to_trim_calls_no_reclaimer(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("8MiB")
    memory.grow("8MiB")
    called: list[int] = []
    account.on_reclaim(lambda nbytes, timeout: called.append(nbytes), "evict")
    broker.ask(number, 64 * MiB)
    assert called == []


def test_a_reclaimer_is_told_how_much_and_how_long(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("8MiB")
    memory.grow("8MiB")
    broker.ask(number, 64 * MiB)
    asked: list[tuple[int, float]] = []
    account.on_reclaim(lambda nbytes, timeout: asked.append((nbytes, timeout)), "evict")
    broker.ask(number, 6 * MiB, rung=EVICT, timeout=2.0)
    ((nbytes, timeout),) = asked
    assert nbytes == 6 * MiB
    assert 0 < timeout <= 2.0


def test_bytes_behind_a_fence_are_announced_and_given_when_it_passes(
    rung: Rung, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = account.range("16MiB", keep="16MiB", extent="2MiB")
    memory.grow("16MiB")
    broker.ask(number, 64 * MiB)
    stream = rung.stream()
    stream.submit()
    memory.shrink("8MiB", stream=stream.handle)
    passes = threading.Timer(0.2, stream.complete)
    passes.start()
    answers = broker.ask(number, 8 * MiB)
    passes.join()
    assert answers[0].bytes == 0
    assert answers[0].coming == 8 * MiB
    assert not answers[0].flags & LAST
    assert given(answers) == 8 * MiB


def test_the_last_answer_comes_before_the_deadline(rung: Rung, opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("16MiB", keep="16MiB", extent="2MiB")
    memory.grow("16MiB")
    broker.ask(number, 64 * MiB)
    stream = rung.stream()
    stream.submit()
    memory.shrink("8MiB", stream=stream.handle)
    assert given(broker.ask(number, 8 * MiB, timeout=0.3)) == 0
    stream.complete()


def test_an_ask_is_answered_while_another_waits_for_a_reclaimer(opened: Opened, broker: Scripted) -> None:
    slow, slow_number = opened("slow")
    busy = slow.range("8MiB")
    busy.grow("8MiB")
    broker.ask(slow_number, 64 * MiB)
    entered, leave = threading.Event(), threading.Event()

    def wait(nbytes: int, timeout: float) -> None:
        entered.set()
        leave.wait(10)

    slow.on_reclaim(wait, "evict")
    other, other_number = opened("other")
    idle = other.range("8MiB", keep="8MiB")
    idle.grow("8MiB")
    idle.shrink("8MiB")
    waiting = threading.Thread(target=broker.ask, args=(slow_number, 8 * MiB, EVICT))
    waiting.start()
    assert entered.wait(10)
    assert given(broker.ask(other_number, 8 * MiB)) >= 8 * MiB
    leave.set()
    waiting.join()


def test_an_ask_for_an_account_that_has_gone_is_answered_with_nothing(
    opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    account.close()
    broker.charged[number] = 0
    (answer,) = broker.ask(number, 8 * MiB)
    assert (answer.bytes, answer.flags) == (0, LAST)


def test_a_reclaimer_that_raises_is_reported_and_answered(
    opened: Opened, broker: Scripted, monkeypatch: object
) -> None:
    import sys

    account, number = opened()
    memory = account.range("8MiB")
    memory.grow("8MiB")
    broker.ask(number, 64 * MiB)
    raised: list[object] = []
    previous, sys.unraisablehook = sys.unraisablehook, lambda args: raised.append(args.exc_value)
    try:

        def fail(nbytes: int, timeout: float) -> None:
            raise RuntimeError("not now")

        account.on_reclaim(fail, "evict")
        answers = broker.ask(number, 8 * MiB, rung=EVICT)
    finally:
        sys.unraisablehook = previous
    assert given(answers) == 0
    assert [str(error) for error in raised] == ["not now"]


def test_limits_that_the_operator_lowers_take_effect_on_an_idle_account(
    opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = account.range("32MiB", keep="32MiB", extent="2MiB")
    memory.grow("32MiB")
    memory.shrink("32MiB")
    broker.set_limits(number, "idle", Limits(0, max=8 * MiB))
    deadline = time.monotonic() + 10
    while account.held > 8 * MiB and time.monotonic() < deadline:
        time.sleep(0.01)
    assert account.held <= 8 * MiB
    assert (account.priority, account.limits.value, account.limits.max) == ("idle", 0, 8 * MiB)


def test_yields_to_other_processes_are_recorded(arena: tem.Arena, opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("8MiB", keep="8MiB")
    memory.grow("8MiB")
    memory.shrink("8MiB")
    broker.ask(number, 64 * MiB)
    record = arena.yields()[-1]
    assert (record.demander, record.victim, record.rung) == ("other/1", "training", "trim")
    assert record.given == 8 * MiB


def test_a_reclaimer_may_grow_another_account_meanwhile(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("8MiB")
    memory.grow("8MiB")
    broker.ask(number, 64 * MiB)
    other, _ = opened("other")
    more = other.range("8MiB")

    def swap(nbytes: int, timeout: float) -> None:
        more.grow("2MiB")
        memory.shrink("8MiB")

    account.on_reclaim(swap, "evict")
    assert given(broker.ask(number, 8 * MiB, rung=EVICT)) == 8 * MiB
    assert other.held == 2 * MiB


def test_while_a_malloc_waits_reclaimers_of_its_own_process_are_left_alone(
    rung: Rung, opened: Opened, broker: Scripted
) -> None:
    """The thread in malloc may hold the GIL, which a reclaimer would wait for."""
    account, number = opened("other")
    memory = account.range("8MiB")
    memory.grow("8MiB")
    broker.ask(number, 64 * MiB)
    called: list[int] = []
    account.on_reclaim(lambda nbytes, timeout: called.append(nbytes), "evict")
    training, _ = opened("training")
    arrived = threading.Event()

    def hold(demand: Demand) -> Message | None:
        arrived.set()
        return None

    broker.policy = hold
    allocator = training.allocator()
    failed: list[str] = []

    def allocate() -> None:
        try:
            allocator.allocate(1 * MiB, 0)
        except tem.OutOfMemory as error:
            failed.append(str(error))

    thread = threading.Thread(target=allocate)
    thread.start()
    assert arrived.wait(10)
    answers = broker.ask(number, 8 * MiB, rung=PAUSE)
    assert given(answers) == 0
    assert called == []
    thread.join()
    assert failed
    training.close()
