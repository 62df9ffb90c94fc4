"""Sleep and wake-up through the arena: nothing is held, addresses stay, and no wake-up is half of one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.platforms import current_platform

import torch_elastic_mem as tem
from tests.vllm.pools import cached, leave
from tests.vllm.small_engine import BLOCKS, CHUNK, LONG, Demand, Engine, MiB
from torch_elastic_mem.integrations.vllm import sleep as module
from torch_elastic_mem.integrations.vllm.memory import CalledOff
from torch_elastic_mem.integrations.vllm.registry import open_account
from torch_elastic_mem.integrations.vllm.sleep import Sleep

pytestmark = pytest.mark.timeout(400)


# The KV cache.


def test_all_of_the_cache_goes_the_null_block_too(full: Engine) -> None:
    leave(full.pool, [1, 9, 30])
    full.controller.put_away()
    assert (full.cache.resident_bytes, full.cache.account.held) == (0, 0)
    assert not any(cached(full.pool, block) for block in (1, 9, 30)), "the null block's neighbour too"
    assert full.controller.away


def test_a_sleeper_has_nothing_that_a_demand_could_wait_for(full: Engine) -> None:
    full.scheduled()
    full.controller.put_away()
    full.pressing.grow(BLOCKS * MiB, timeout=LONG)
    assert full.preempted_by == []


def test_a_sleeper_does_not_grow(small: Engine) -> None:
    small.controller.put_away()
    small.step(needed=8, ahead=8)
    assert small.controller.grower.coming == []
    assert small.cache.account.held == 0


def test_what_was_to_come_goes_too(small: Engine) -> None:
    small.step(needed=1, ahead=20)
    small.controller.put_away()
    assert (small.cache.account.held, small.controller.grower.coming) == (0, [])


def test_blocks_in_use_keep_an_engine_awake(full: Engine) -> None:
    full.hold(7)
    with pytest.raises(tem.InUseError, match="requests hold 1 of its blocks"):
        full.controller.put_away()
    assert (full.controller.away, full.cache.resident_bytes) == (False, BLOCKS * MiB)
    full.assert_sound()


def test_a_demand_that_waits_is_met_by_falling_asleep(full: Engine) -> None:
    full.scheduled()
    demand = Demand(full, 4 * CHUNK)
    assert demand.waits()
    full.controller.put_away()
    assert demand.ended() is True


def test_it_wakes_with_what_vllm_has_for_itself_and_grows_from_there(full: Engine) -> None:
    full.controller.put_away()
    assert full.controller.bytes == CHUNK
    full.controller.bring_back(LONG)
    assert not full.controller.away
    full.assert_sound()
    assert full.cache.resident_bytes == CHUNK
    full.step(needed=12, ahead=12)
    full.assert_sound()
    assert full.cache.resident_bytes >= 6 * CHUNK


def test_a_wake_up_that_gives_way_to_somebody_is_tried_again(
    full: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.controller.put_away()
    plain, refusals = full.cache.ensure, [CalledOff("somebody else was given it")] * 2

    def ensure(*args: Any, **named: Any) -> None:
        if refusals:
            raise refusals.pop()
        plain(*args, **named)

    monkeypatch.setattr(full.cache, "ensure", ensure)
    full.controller.bring_back(LONG)
    assert not full.controller.away
    full.controller.put_away()
    refusals += [CalledOff("somebody else was given it")]
    with pytest.raises(tem.OutOfMemory, match="somebody else"):
        full.controller.bring_back(0.0)
    assert full.controller.away


def test_one_that_is_closed_while_it_sleeps_has_given_everything_back(full: Engine) -> None:
    full.controller.put_away()
    full.controller.close()
    assert full.cache.account.held == 0


# Both together.


class Sleeper:
    """A small engine with weights beside its cache, a runner's state, and scratch."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.arena = engine, engine.arena
        self.account = engine.cache.account
        self.sleep = Sleep(self.arena, self.account)
        self.sleep.cache = engine.cache
        with self.sleep.allocations("weights"):
            self.weight = torch.arange(2 * MiB, dtype=torch.int32)
        with self.sleep.allocations("runtime"):
            self.state = torch.arange(MiB // 2, dtype=torch.int32)
        with self.sleep.graphs.allocations():
            self.work = torch.arange(MiB // 2, dtype=torch.int32)
        with self.sleep.allocations("workspace"):
            self.scratch = torch.ones(MiB // 2, dtype=torch.int32)
        self.addresses = self._addresses()
        self.bytes = self.sleep.bytes

    def _addresses(self) -> list[int]:
        return [each.data_ptr() for each in (self.weight, self.state, self.work, self.scratch)]

    def whole(self, *, weights: bool = True) -> bool:
        self.scratch.fill_(1)
        kept = torch.arange(MiB // 2, dtype=torch.int32)
        same = (
            torch.equal(self.state, kept)
            and torch.equal(self.work, kept)
            and (not weights or torch.equal(self.weight, torch.arange(2 * MiB, dtype=torch.int32)))
        )
        return same and self.addresses == self._addresses()

    def taken(self, left: int) -> None:
        """A neighbour takes all but so many bytes."""
        self.engine.pressing.grow(self.arena.capacity - left, timeout=LONG)


@pytest.fixture
def sleeper(extension: None, engines: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Sleeper]:
    monkeypatch.setattr(module, "WAKE", 0.05)
    engines.append(Engine(BLOCKS // 2, 32 * MiB))
    made = Sleeper(engines[-1])
    yield made
    stowages = [stowage for stowage, _ in made.sleep._stowages()]
    for stowage in stowages:
        stowage.bring_back(LONG)
    del made.weight, made.state, made.work, made.scratch
    for stowage in stowages:
        stowage.close()


def test_a_sleeping_engine_holds_nothing(sleeper: Sleeper) -> None:
    sleeper.sleep.suspend(1)
    assert (sleeper.account.held, sleeper.sleep.state()) == (0, "SUSPENDED")
    sleeper.sleep.resume()
    assert (sleeper.account.held, sleeper.sleep.state()) == (sleeper.bytes + CHUNK, "RUNNING")
    assert sleeper.whole()


def test_level_2_keeps_no_bytes_but_a_runners_state_and_what_graphs_work_in(sleeper: Sleeper) -> None:
    sleeper.sleep.suspend(2)
    kept = [stowage for stowage, _ in sleeper.sleep._stowages() if stowage._saved]
    assert kept == [sleeper.sleep.graphs, sleeper.sleep.runtime]
    sleeper.sleep.resume()
    assert sleeper.whole(weights=False)


@pytest.mark.parametrize("order", [["weights", "kv_cache"], ["kv_cache", "weights"]])
def test_a_partial_wake_brings_back_what_is_named_and_what_has_no_name(
    sleeper: Sleeper, order: list[str]
) -> None:
    sizes = {"weights": sleeper.sleep.weights.bytes, "kv_cache": CHUNK}
    rest = sleeper.bytes - sizes["weights"]
    sleeper.sleep.suspend(1)
    sleeper.sleep.resume(order[:1])
    assert (sleeper.account.held, sleeper.sleep.state()) == (rest + sizes[order[0]], "SUSPENDED")
    assert sleeper.whole(weights=False)
    sleeper.sleep.resume(order[1:])
    assert (sleeper.account.held, sleeper.sleep.state()) == (rest + sum(sizes.values()), "RUNNING")
    assert sleeper.whole()


def test_one_that_is_half_awake_falls_asleep_again(sleeper: Sleeper) -> None:
    sleeper.sleep.suspend(1)
    for tags in (["kv_cache"], ["weights"]):
        sleeper.sleep.resume(tags)
        sleeper.sleep.suspend(1)
        assert (sleeper.account.held, sleeper.sleep.state()) == (0, "SUSPENDED")
    sleeper.sleep.resume()
    assert sleeper.whole()


@pytest.mark.parametrize("left", [0, CHUNK, 4 * CHUNK])
def test_a_wake_up_that_cannot_have_all_has_nothing_and_says_who_holds_it(
    sleeper: Sleeper, left: int
) -> None:
    sleeper.sleep.suspend(1)
    sleeper.taken(left)
    with pytest.raises(tem.OutOfMemory, match=r"sleeps on: .*pressing holds"):
        sleeper.sleep.resume()
    assert (sleeper.account.held, sleeper.sleep.state()) == (0, "SUSPENDED")
    assert all(stowage.away for stowage, _ in sleeper.sleep._stowages())
    assert sleeper.engine.controller.away
    sleeper.engine.pressing.shrink(sleeper.engine.pressing.mapped)
    sleeper.sleep.resume()
    assert sleeper.whole()


def test_a_lower_class_yields_for_a_wake_up(sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAKE", LONG)
    sleeper.sleep.suspend(1)
    with sleeper.arena.account("training", "training") as trainer:
        memory = trainer.range(sleeper.arena.capacity, extent=CHUNK)
        memory.grow(sleeper.arena.capacity)
        trainer.on_reclaim(lambda nbytes, timeout: memory.shrink(nbytes), "pause")
        sleeper.sleep.resume()
        assert sleeper.whole()
        memory.close()


def test_the_weights_alone_may_go(sleeper: Sleeper) -> None:
    held = sleeper.account.held
    sleeper.sleep.discard(("weights",))
    assert sleeper.sleep.state() == "SUSPENDED"
    assert sleeper.account.held == held - sleeper.sleep.weights.bytes
    sleeper.sleep.resume(["weights"])
    assert sleeper.whole(weights=False) and sleeper.sleep.state() == "RUNNING"


def test_the_cache_alone_may_go(sleeper: Sleeper) -> None:
    sleeper.sleep.discard(("kv_cache",))
    assert sleeper.account.held == sleeper.bytes
    sleeper.sleep.suspend(1)
    assert sleeper.account.held == 0
    sleeper.sleep.resume()
    assert sleeper.whole() and not sleeper.engine.controller.away


def test_an_engine_whose_weights_cannot_go_stays_awake(
    sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*, keep: bool) -> None:
        raise tem.InUseError("a graph is captured")

    monkeypatch.setattr(sleeper.sleep.weights, "put_away", refused)
    with pytest.raises(tem.InUseError):
        sleeper.sleep.suspend(1)
    assert (sleeper.engine.controller.away, sleeper.sleep.state()) == (False, "RUNNING")
    assert sleeper.whole()
    sleeper.engine.assert_sound()


def test_host_memory_that_is_not_to_be_had_is_asked_for_before_anything_goes(
    sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(address: int, count: int) -> None:
        assert not sleeper.engine.controller.away
        raise RuntimeError("no memory can be pinned")

    monkeypatch.setattr(sleeper.sleep.weights, "_copied", refused)
    with pytest.raises(RuntimeError, match="pinned"):
        sleeper.sleep.suspend(1)
    assert (sleeper.engine.controller.away, sleeper.sleep.state()) == (False, "RUNNING")
    assert sleeper.whole() and not sleeper.sleep.runtime._saved
    sleeper.engine.assert_sound()


def test_one_that_neither_falls_asleep_nor_wakes_again_can_be_woken(
    sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*, keep: bool) -> None:
        raise tem.InUseError("a graph is captured")

    with monkeypatch.context() as patch:
        patch.setattr(sleeper.sleep.weights, "put_away", refused)
        patch.setattr(sleeper.engine.cache, "ensure", out_of_memory)
        sleeper.sleep.suspend(1)
    assert (sleeper.engine.controller.away, sleeper.sleep.state()) == (True, "SUSPENDED")
    sleeper.sleep.resume()
    assert sleeper.whole() and sleeper.sleep.state() == "RUNNING"
    assert not sleeper.engine.controller.away
    sleeper.engine.assert_sound()


def out_of_memory(*args: Any, **named: Any) -> None:
    raise tem.OutOfMemory("training holds all")


@pytest.mark.parametrize("tags", [["kv_cache"], ["weights"]])
def test_the_scheduler_knows_of_weights_that_are_away(sleeper: Sleeper, tags: list[str]) -> None:
    sleeper.sleep.suspend(1)
    assert sleeper.engine.controller.weights_away
    sleeper.sleep.resume(tags)
    assert sleeper.engine.controller.weights_away == (tags == ["kv_cache"])
    sleeper.sleep.resume()
    assert not sleeper.engine.controller.weights_away
    sleeper.sleep.discard(("weights",))
    assert sleeper.engine.controller.weights_away


def test_what_graphs_work_in_goes_with_the_engine_and_the_rest_with_who_has_it(sleeper: Sleeper) -> None:
    sleeper.sleep._pool = (0, 1)
    sleeper.engine.controller.put_away()
    sleeper.sleep.close()
    assert sleeper.sleep.graphs.resident_bytes == 0
    assert sleeper.account.held == sleeper.bytes - sleeper.sleep.graphs.bytes
    sleeper.engine.controller.bring_back(LONG)


def test_an_account_can_be_closed_after_an_engine_of_which_nothing_is_left() -> None:
    with tem.Arena("host", capacity=16 * MiB, broker=None) as arena:
        account = arena.account("engine", "serving")
        Sleep(arena, account).close()
        account.close()


def test_weights_that_outlive_their_engine_are_closed_when_the_next_one_comes(extension: None) -> None:
    with tem.Arena("host", capacity=16 * MiB, broker=None) as arena:
        account = arena.account("engine", "serving")
        sleep = Sleep(arena, account)
        with sleep.weights.allocations():
            weight = torch.ones(MiB)
        sleep.close()
        assert account.held >= weight.nbytes
        del sleep, weight
        gc.collect()
        open_account(arena).close()
        account.close()


def test_graphs_of_an_engine_whose_torch_is_nobodys_account_stay_as_they_are(sleeper: Sleeper) -> None:
    with pytest.raises(tem.TemError, match="torch_allocator"):
        sleeper.sleep.keep_graphs()
    before = type(current_platform)._global_graph_pool
    with sleeper.sleep.capturing():
        assert type(current_platform)._global_graph_pool == before


def test_warm_extents_go_with_the_last_who_is_awake_and_come_back(sleeper: Sleeper) -> None:
    sleeper.arena.set_reserve(0, 16 * MiB)
    sleeper.sleep.suspend(1)
    assert sleeper.arena.snapshot().created == 0
    sleeper.sleep.resume()
    assert sleeper.arena.snapshot().reserve_high == 16 * MiB


def test_falling_asleep_twice_and_waking_twice_changes_nothing(sleeper: Sleeper) -> None:
    sleeper.sleep.resume()
    for _ in range(2):
        sleeper.sleep.suspend(1)
    for _ in range(2):
        sleeper.sleep.resume()
    assert sleeper.whole()
