"""Growth ahead of need, what a refusal leaves, and how an engine's controller ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.arena.watch import comes_true
from tests.vllm.pools import free_ids, leave
from tests.vllm.small_engine import BLOCKS, CHUNK, LONG, Demand, Engine, MiB
from torch_elastic_mem.integrations.vllm import controller as module
from torch_elastic_mem.integrations.vllm import grower as grower_module
from torch_elastic_mem.integrations.vllm.demand import Needs
from torch_elastic_mem.integrations.vllm.grower import SHORT, WARM

pytestmark = pytest.mark.timeout(60)


def held_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Memory comes to the engine's cache when this is set."""
    gate, ensure = threading.Event(), engine.cache.ensure

    def slow(chunks: list[int], rung: str, timeout: float | None) -> None:
        gate.wait()
        ensure(chunks, rung, timeout)

    monkeypatch.setattr(engine.cache, "ensure", slow)
    return gate


def test_a_step_that_needs_blocks_has_them_and_they_have_memory(small: Engine) -> None:
    small.step(needed=9, ahead=9)
    assert len(free_ids(small.pool)) >= 9
    small.assert_sound()


def test_unused_blocks_ahead_of_need_are_asked_for_and_not_waited_for(small: Engine) -> None:
    small.step(needed=1, ahead=9)
    assert len(small.controller.grower.coming) == 4
    small.controller.grower.wait(LONG)
    small.step(needed=1, ahead=9)
    assert (free_ids(small.pool), small.controller.grower.coming) == ([*range(2, 10), 1], [])
    small.assert_sound()


def test_what_is_coming_is_not_asked_for_again(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, calls, ensure = threading.Event(), [], small.cache.ensure

    def slow(chunks: list[int], rung: str, timeout: float | None) -> None:
        calls.append(list(chunks))
        gate.wait()
        ensure(chunks, rung, timeout)

    monkeypatch.setattr(small.cache, "ensure", slow)
    small.step(ahead=3)
    for _ in range(3):
        small.step(ahead=9)
    assert sorted(small.controller.grower.coming) == [1, 2, 3, 4]
    gate.set()
    while small.balloon.parked > 11:
        small.controller.grower.wait(LONG)
        small.step(ahead=9)
    assert sorted(chunk for call in calls for chunk in call) == [1, 2, 3, 4]
    small.assert_sound()


def test_a_growth_goes_on_to_the_upper_mark_so_that_the_next_steps_have_enough(small: Engine) -> None:
    small.step(needed=1, ahead=4, high=10)
    while small.controller.grower.coming:
        small.controller.grower.wait(LONG)
        small.step(needed=1, ahead=4, high=10)
    assert len(free_ids(small.pool)) == 11
    small.requests.append(small.pool.get_new_blocks(7))
    small.step(needed=1, ahead=4, high=10)
    assert small.controller.grower.coming == [], "four are left"
    small.requests.append(small.pool.get_new_blocks(1))
    small.step(needed=1, ahead=4, high=10)
    assert len(small.controller.grower.coming) == 4
    small.assert_sound()


def test_nothing_is_asked_for_while_enough_is_unused(full: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    full.pressing.grow(4 * CHUNK, timeout=LONG)

    def unexpected() -> Needs:
        raise AssertionError("what a step needs is counted only where it may be short")

    monkeypatch.setattr(full.controller, "_needs", unexpected)
    full.step(ahead=10)
    assert full.controller.grower.coming == []
    assert full.balloon.parked == 4


def test_cached_blocks_are_not_unused_and_the_cache_grows_beside_them(small: Engine) -> None:
    small.step(needed=9, ahead=9)
    leave(small.pool, free_ids(small.pool))
    small.step(needed=5, ahead=5)
    small.controller.grower.wait(LONG)
    small.step(needed=5, ahead=5)
    assert small.balloon.unused(100) >= 5
    small.assert_sound()


def test_it_grows_to_its_end_and_no_further(small: Engine) -> None:
    small.step(needed=100, ahead=100)
    assert small.balloon.parked == 0
    small.assert_sound()
    small.step(needed=100, ahead=100)
    assert small.controller.grower.coming == []


def test_a_refused_growth_leaves_the_pool_as_it_is_and_is_not_waited_for(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ask = [], small.controller.grower.ask

    def noted(chunks: list[int], short: bool) -> None:
        asked.append(list(chunks))
        ask(chunks, short)

    monkeypatch.setattr(small.controller.grower, "ask", noted)
    small.pressing.grow(15 * CHUNK, timeout=LONG)
    for _ in range(3):
        small.step(needed=9, ahead=9)
        assert free_ids(small.pool) == [1]
        small.assert_sound()
    assert asked == [[1, 2, 3, 4]], "who has just been refused does not ask"


def test_of_a_growth_comes_what_there_is_room_for(small: Engine) -> None:
    small.pressing.grow(13 * CHUNK, timeout=LONG)
    small.step(needed=9, ahead=9)
    assert sorted(free_ids(small.pool)) == [1, 2, 3, 4, 5]
    small.assert_sound()


@pytest.mark.parametrize("limit", ["high", "max"])
def test_at_its_own_limit_an_engine_gives_up_what_is_cached_to_grow_and_nothing_else(
    small: Engine, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    small.cache.account.set_limits(**{limit: 6 * CHUNK})
    small.hold(1)
    for _ in range(3):
        small.step(needed=18, ahead=18)
        small.controller.grower.wait(LONG)
        leave(small.pool, free_ids(small.pool))
        assert small.cache.account.held <= 6 * CHUNK
        assert (small.preempted_by, small.demands(), small.controller.draining) == ([], [], False)
    small.balloon.unpark(small.controller.grower.take())
    small.assert_sound()


def test_a_growth_is_no_dearer_and_no_larger_than_it_is_needed_yet(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = held_back(small, monkeypatch)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    small.step(needed=28, ahead=2)
    grower = small.controller.grower
    assert comes_true(lambda: grower._at_work == [1, 2, 3, 4])
    assert len(grower.coming) == 14 and grower._short
    small.step(ahead=1, high=11)
    assert (len(grower.coming), grower._short) == (5, False), "what is at work, and one more"
    small.step(ahead=1)
    assert grower.coming == [1, 2, 3, 4]
    gate.set()
    grower.wait(LONG)


def test_memory_that_does_not_come_is_waited_for_no_longer_than_patience(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    gate = held_back(small, monkeypatch)
    small.step(needed=9, ahead=9)
    assert free_ids(small.pool) == [1]
    assert small.controller.grower.coming == [1, 2, 3, 4]
    gate.set()
    small.controller.grower.wait(LONG)
    small.step(needed=9, ahead=9)
    assert len(free_ids(small.pool)) == 9
    small.assert_sound()


@pytest.fixture
def slow(small: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Memory of the small engine comes when this is set, and whoever waits for it does so too long."""
    monkeypatch.setattr(module, "PATIENCE", LONG)
    gate = held_back(small, monkeypatch)
    yield gate
    gate.set()


def steps(engine: Engine, **takes: int) -> threading.Thread:
    thread = threading.Thread(target=lambda: engine.step(**takes), daemon=True)
    thread.start()
    return thread


def test_a_step_that_has_something_to_do_does_not_wait_for_those_who_are_to_be_admitted(
    small: Engine, slow: threading.Event
) -> None:
    step = steps(small, needed=9, least=1, ahead=9)
    step.join(LONG)
    assert not step.is_alive() and not slow.is_set()
    assert small.controller.grower.coming == [1, 2, 3, 4], "it comes meanwhile"
    slow.set()
    small.controller.grower.wait(LONG)
    small.step(needed=9, least=1, ahead=9)
    assert len(free_ids(small.pool)) == 9


def test_a_step_gives_up_a_prefix_rather_than_wait_for_memory(small: Engine, slow: threading.Event) -> None:
    leave(small.pool, free_ids(small.pool))
    step = steps(small, needed=1, least=1, ahead=9)
    step.join(LONG)
    assert not step.is_alive() and not slow.is_set()
    assert len(small.controller.grower.coming) == 5, "it comes meanwhile"
    slow.set()
    small.controller.grower.wait(LONG)
    small.step(needed=1, least=1, ahead=9)
    assert small.balloon.unused(100) >= 8
    small.assert_sound()


def test_a_step_waits_for_memory_rather_than_preempt_a_request(small: Engine, slow: threading.Event) -> None:
    step = steps(small, needed=9, least=2, ahead=9)
    step.join(0.2)
    assert step.is_alive()
    slow.set()
    step.join(LONG)
    assert len(free_ids(small.pool)) == 9


def test_what_was_refused_is_tried_again_and_not_waited_for_again_until_some_has_come(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grower_module, "REST", 0.0)
    small.pressing.grow(15 * CHUNK, timeout=LONG)
    small.step(needed=9, ahead=9)
    assert small.controller.grower.refused(short=True)
    monkeypatch.setattr(module, "PATIENCE", LONG)
    gate = held_back(small, monkeypatch)
    step = steps(small, needed=9, ahead=9)
    step.join(LONG)
    assert not step.is_alive() and small.controller.grower.coming == [1, 2, 3, 4]
    small.pressing.shrink(15 * CHUNK)
    gate.set()
    small.controller.grower.wait(LONG)
    assert not small.controller.grower.refused(short=True)
    small.step(needed=13, ahead=13)
    assert len(free_ids(small.pool)) == 13


def test_after_its_rest_a_refused_growth_is_tried_again(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.pressing.grow(15 * CHUNK, timeout=LONG)
    small.step(needed=9, ahead=9)
    # What another process gives back is not seen.
    monkeypatch.setattr(small.cache, "room", lambda: 0)
    small.pressing.shrink(15 * CHUNK)
    small.step(needed=9, ahead=9)
    assert free_ids(small.pool) == [1]
    monkeypatch.setattr(grower_module, "REST", 0.0)
    small.step(needed=9, ahead=9)
    small.controller.grower.wait(LONG)
    small.step(needed=9, ahead=9)
    assert len(free_ids(small.pool)) == 9
    small.assert_sound()


def test_a_refused_growth_is_tried_again_and_waited_for_as_soon_as_memory_comes_free(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grower_module, "REST", LONG)
    monkeypatch.setattr(module, "PATIENCE", LONG)
    small.pressing.grow(15 * CHUNK, timeout=LONG)
    small.step(needed=9, ahead=9)
    assert free_ids(small.pool) == [1]
    small.pressing.shrink(15 * CHUNK)
    small.step(needed=9, ahead=9)
    assert len(free_ids(small.pool)) == 9
    small.assert_sound()


def test_memory_that_has_come_and_was_not_taken_goes_to_who_asks(small: Engine) -> None:
    small.step(ahead=9)
    small.controller.grower.wait(LONG)
    assert small.cache.resident_bytes == 5 * CHUNK
    small.pressing.grow(15 * CHUNK, timeout=LONG)
    assert (small.controller.grower.coming, small.cache.resident_bytes) == ([], CHUNK)
    small.assert_sound()


def test_parked_blocks_are_not_in_use_and_until_memory_is_refused_they_are_to_be_had(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grower_module, "REST", 0.0)  # it may ask again at once, and is short all the while
    assert small.controller.usage() == 0.0
    small.hold(1)
    assert small.controller.usage() == 1 / 31
    small.pressing.grow(15 * CHUNK, timeout=LONG)
    small.step(needed=9, ahead=9)
    assert small.controller.usage() == 1.0
    small.pressing.shrink(15 * CHUNK)
    assert comes_true(lambda: small.controller.usage() == 1 / 31)


def test_a_full_engine_is_in_use_by_what_requests_hold(full: Engine) -> None:
    full.hold(*range(1, 12))
    full.pressing.grow(8 * CHUNK, timeout=LONG)
    assert full.controller.usage() == 11 / 31


def test_a_demand_that_waits_is_met_by_closing(full: Engine) -> None:
    full.scheduled()
    demand = Demand(full, CHUNK)
    assert demand.waits()
    full.controller.close()
    assert demand.ended() is True
    assert full.demands() == []


def test_who_has_closed_has_given_everything_back_and_grows_no_more(full: Engine) -> None:
    full.hold(3, 4)
    threads = threading.active_count()
    full.controller.close()
    assert threading.active_count() == threads - 2, "neither who grows nor who tells is left"
    assert full.cache.resident_bytes == full.cache.account.held == 0
    full.pressing.grow(BLOCKS * MiB, timeout=LONG)
    full.controller.close()


def test_what_was_to_come_when_it_closed_is_given_back_too(small: Engine) -> None:
    small.step(needed=1, ahead=9)
    small.controller.close()
    assert small.cache.account.held == 0


def test_who_has_cached_blocks_to_use_asks_others_for_no_more_than_what_is_cheap(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs, ensure = [], small.cache.ensure

    def noted(chunks: list[int], rung: str, timeout: float | None) -> None:
        rungs.append(rung)
        ensure(chunks, rung, timeout)

    monkeypatch.setattr(small.cache, "ensure", noted)
    small.step(needed=3, ahead=3)
    leave(small.pool, free_ids(small.pool))
    small.step(needed=3, ahead=3)
    small.controller.grower.wait(LONG)
    assert rungs[0] == SHORT and set(rungs[1:]) == {WARM}, "cached blocks are free as well"


def test_what_is_on_its_way_is_given_before_anybody_is_preempted(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure, begun, gate = small.cache.ensure, threading.Event(), threading.Event()

    def slow(chunks: list[int], *args: Any) -> None:
        ensure(chunks, *args)
        begun.set()
        gate.wait()

    monkeypatch.setattr(small.cache, "ensure", slow)
    small.hold(1)
    small.step(ahead=9)
    assert begun.wait(LONG)
    demand = Demand(small, 15 * CHUNK)
    assert demand.waits("pause")
    small.step(ahead=9)
    assert small.demands() == ["pause"], "nor does it grow meanwhile"
    gate.set()
    assert demand.ended() is True
    assert (small.preempted_by, small.controller.grower.coming) == ([], [])
    small.assert_sound()
