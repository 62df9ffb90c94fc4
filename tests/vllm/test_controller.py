"""Between an engine's scheduler and its memory: who is served when, and what is left of the pool."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest

pytest.importorskip("vllm")

import torch_elastic_mem as tem
from tests.vllm.pools import cached, leave
from tests.vllm.small_engine import BLOCKS, CHUNK, LONG, Demand, Engine
from torch_elastic_mem.integrations.vllm import controller
from torch_elastic_mem.integrations.vllm.demand import Needs
from torch_elastic_mem.integrations.vllm.grower import Grower

pytestmark = pytest.mark.timeout(60)


def test_an_idle_engine_is_served_by_the_thread_that_asks(
    full: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    released_by: list[int] = []
    release = full.cache.release

    def noted(chunks: Iterable[int]) -> None:
        released_by.append(threading.get_ident())
        release(chunks)

    monkeypatch.setattr(full.cache, "release", noted)
    full.pressing.grow(4 * CHUNK, timeout=LONG)
    assert released_by == [threading.get_ident()]
    assert full.balloon.parked == 4
    full.assert_sound()


def test_all_but_the_null_blocks_chunk_may_go(full: Engine) -> None:
    full.pressing.grow(15 * CHUNK, timeout=LONG)
    assert full.cache.resident_bytes == CHUNK
    full.assert_sound()
    with pytest.raises(tem.OutOfMemory):
        full.pressing.grow(CHUNK, timeout=LONG)


def test_what_is_not_cached_goes_before_a_warm_prefix_and_the_coldest_of_those_first(full: Engine) -> None:
    leave(full.pool, [30, 28])
    full.pressing.grow(13 * CHUNK, timeout=LONG)
    assert cached(full.pool, 30) and cached(full.pool, 28)
    full.pressing.grow(CHUNK, timeout=LONG)
    assert (cached(full.pool, 30), cached(full.pool, 28)) == (False, True)
    full.assert_sound()


def test_between_scheduling_and_the_stream_a_demand_waits(full: Engine) -> None:
    full.scheduled()
    demand = Demand(full, 2 * CHUNK)
    assert demand.waits()
    assert (full.balloon.parked, full.cache.resident_bytes) == (0, 16 * CHUNK)
    full.controller.step_enqueued()
    assert demand.ended() is True
    assert full.balloon.parked == 2
    full.assert_sound()


def test_a_demand_waits_for_all_the_steps_that_are_scheduled(full: Engine) -> None:
    full.scheduled()
    full.scheduled()
    demand = Demand(full, 2 * CHUNK)
    assert demand.waits()
    full.controller.step_enqueued()
    assert full.demands() == ["evict"] and full.balloon.parked == 0
    full.controller.step_enqueued()
    assert demand.ended() is True


def test_work_that_no_scheduling_came_before_is_not_counted(full: Engine) -> None:
    full.controller.step_enqueued()
    full.scheduled()
    demand = Demand(full, CHUNK)
    assert demand.waits()
    full.controller.step_enqueued()
    assert demand.ended() is True


def test_the_worker_tells_by_the_cache_when_the_stream_has_a_steps_work(full: Engine) -> None:
    full.scheduled()
    demand = Demand(full, CHUNK)
    assert demand.waits()
    full.cache.on_enqueued()
    assert demand.ended() is True


def test_a_demand_that_waits_is_served_before_the_next_step(full: Engine) -> None:
    full.scheduled()
    demand = Demand(full, CHUNK)
    assert demand.waits()
    full.step()
    assert demand.ended() is True
    full.assert_sound()


def test_whoever_asks_is_answered_in_time_though_a_step_holds_the_lock(full: Engine) -> None:
    with full.controller.lock:
        asking = threading.Thread(target=full.controller._asked, args=("evict", CHUNK, 0.01))
        asking.start()
        asking.join()
    assert full.balloon.parked == 0


def test_what_nobody_waits_for_any_more_is_not_given(full: Engine) -> None:
    full.scheduled()
    full.controller._asked("evict", CHUNK, 0.01)
    full.controller.step_enqueued()
    assert (full.balloon.parked, full.demands()) == (0, [])


def test_blocks_in_use_are_not_evicted(full: Engine) -> None:
    full.hold(*range(2, BLOCKS, 2))
    # A lowered `high` asks "evict" alone.
    full.cache.account.set_limits(high=CHUNK, timeout=LONG)
    assert (full.balloon.parked, full.demands()) == (0, [])
    full.pool.free_blocks(full.requests.pop())
    full.hold(8, 21)
    full.cache.account.set_limits(high=4 * CHUNK, timeout=LONG)
    assert full.cache.resident_bytes == 4 * CHUNK
    full.assert_sound()


def test_for_a_demand_that_may_preempt_the_engines_thread_preempts_as_much_as_it_takes(full: Engine) -> None:
    full.hold(*range(1, 20))
    full.hold(*range(20, 26))
    full.hold(*range(26, BLOCKS))
    demand = Demand(full, 6 * CHUNK)
    assert demand.waits("pause")
    assert full.preempted_by == [] and full.balloon.parked == 0
    full.step()
    assert demand.ended() is True
    assert full.preempted_by == [threading.get_ident()] * 2
    assert full.balloon.parked == 6
    full.assert_sound()


def test_what_an_engine_has_asked_for_itself_keeps_a_higher_class_waiting_for_a_moment_only(
    full: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.hold(*range(1, 20))
    full.hold(*range(20, BLOCKS))
    monkeypatch.setattr(Grower, "working", property(lambda self: True))
    demand = Demand(full, 2 * CHUNK)
    assert demand.waits("pause")
    full.step()
    assert full.preempted_by == [], "it may come yet"
    monkeypatch.setattr(controller, "PATIENCE", 0.0)
    full.step()
    assert demand.ended() is True and len(full.preempted_by) == 1
    full.assert_sound()


def test_nobody_waits_for_preemptions_where_no_step_is_to_come(
    full: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.hold(*range(1, 30))
    monkeypatch.setattr(full.controller, "_goes_on", lambda: False)
    with pytest.raises(tem.OutOfMemory):
        full.pressing.grow(2 * CHUNK, timeout=LONG)
    assert full.balloon.parked == 1 and full.demands() == []
    full.assert_sound()


def test_what_is_free_goes_before_anybody_is_preempted(full: Engine) -> None:
    full.hold(*range(1, 8))
    full.pressing.grow(12 * CHUNK, timeout=LONG)
    assert full.preempted_by == []
    full.assert_sound()


def test_a_demand_for_more_than_there_is_takes_all_and_is_refused(full: Engine) -> None:
    full.hold(1, 5)
    full.hold(9, 10)
    demand = Demand(full, 16 * CHUNK)
    assert demand.waits("pause")
    full.step()
    assert demand.ended() is False
    assert (len(full.preempted_by), full.cache.resident_bytes) == (2, CHUNK)
    full.assert_sound()


def test_a_demand_waits_for_copies_of_what_nobody_holds(full: Engine) -> None:
    full.read = set(range(2, BLOCKS))
    demand = Demand(full, 2 * CHUNK)
    assert demand.waits()
    full.read = {2, 3}
    full.controller.reconsider()
    assert demand.ended() is True
    assert len(full.without_memory()) == 4 and not full.without_memory() & full.read
    full.assert_sound()


def test_nobody_is_preempted_while_what_another_had_waits_for_a_step_in_flight(
    full: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.hold(*range(2, 16))
    full.hold(*range(16, BLOCKS))

    def preempt() -> bool:
        full.deferred.append(full.requests.pop())
        return True

    monkeypatch.setattr(full.controller, "_preempt", preempt)
    demand = Demand(full, 4 * CHUNK)
    assert demand.waits("pause")
    full.step()
    full.step()
    assert (len(full.deferred), full.demands(), full.balloon.parked) == (1, ["pause"], 0)
    full.pool.free_blocks(full.deferred.pop())
    full.controller.reconsider()
    assert demand.ended() is True
    assert (len(full.requests), full.balloon.parked) == (1, 4)
    full.assert_sound()


def test_a_demand_that_cannot_be_looked_at_is_nobodys_afterwards(
    full: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Needs:
        raise ValueError

    monkeypatch.setattr(full.controller, "_needs", broken)
    with pytest.raises(ValueError, match=""):
        full.controller._asked("evict", CHUNK, LONG)
    monkeypatch.undo()
    full.step()
    assert (full.demands(), full.balloon.parked) == ([], 0)


def test_while_nobody_can_spare_what_is_read_a_demand_does_not_wait_for_it(full: Engine) -> None:
    full.read = set(range(2, BLOCKS))
    full.needs = Needs(BLOCKS, BLOCKS, BLOCKS)
    # A lowered `high` asks "evict" alone.
    full.cache.account.set_limits(high=CHUNK, timeout=LONG)
    assert (full.balloon.parked, full.demands()) == (0, [])


def test_nobody_is_preempted_for_what_comes_free_once_it_is_copied(
    full: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.hold(*range(2, 16))
    full.hold(*range(16, BLOCKS))

    def preempt() -> bool:
        full.read = {block.block_id for block in full.requests[-1]}
        return full.preempt()

    monkeypatch.setattr(full.controller, "_preempt", preempt)
    demand = Demand(full, 4 * CHUNK)
    assert demand.waits("pause")
    full.step()
    full.step()
    assert (len(full.preempted_by), full.demands(), full.balloon.parked) == (1, ["pause"], 0)
    full.read.clear()
    full.controller.reconsider()
    assert demand.ended() is True
    assert (len(full.preempted_by), full.balloon.parked) == (1, 4)
    full.assert_sound()
