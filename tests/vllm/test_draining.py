"""What requests hold, at the rung shrink: given as they end, while nobody is admitted."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

import torch_elastic_mem as tem
from tests.arena.watch import comes_true
from tests.vllm.facts import facts
from tests.vllm.small_engine import BLOCKS, CHUNK, LONG, Engine, MiB
from torch_elastic_mem.integrations.vllm.demand import Needs

pytestmark = pytest.mark.timeout(400)


def lend(engines: list[Any], held: int) -> tuple[Engine, Any]:
    """An engine whose requests hold all it has, and a peer that holds so much; nothing is free."""
    engine = Engine(BLOCKS // 2, more=held)
    engines.append(engine)
    for block in range(1, BLOCKS):
        engine.hold(block)
    peer = engine.arena.account("peer", "serving").range("64MiB")
    peer.grow(held)
    return engine, peer


@pytest.fixture
def lent(engines: list[Any]) -> tuple[Engine, Any]:
    """The peer has two thirds of its share."""
    return lend(engines, 16 * MiB)


def refused(peer: Any, nbytes: int, timeout: float = LONG) -> bool:
    try:
        peer.grow(nbytes, timeout=timeout)
    except tem.OutOfMemory:
        return True
    return False


def end(engine: Engine, *ids: int) -> None:
    """The requests that hold these blocks end."""
    for request in [each for each in engine.requests if each[0].block_id in ids]:
        engine.requests.remove(request)
        engine.pool.free_blocks(request)


def test_for_a_peer_nobody_is_preempted_and_what_comes_free_is_given(lent: tuple[Engine, Any]) -> None:
    engine, peer = lent
    assert refused(peer, 2 * CHUNK)
    assert engine.controller.draining and engine.preempted_by == []
    end(engine, 8, 9, 20)
    engine.step()
    assert engine.balloon.parked == 1 and engine.controller.draining
    end(engine, 21, 22, 23, 24, 25)
    engine.step()
    assert engine.balloon.parked == 2 and not engine.controller.draining
    peer.grow(2 * CHUNK, timeout=LONG)
    assert engine.preempted_by == []
    engine.assert_sound()


def test_a_peer_with_less_than_half_of_its_share_may_have_requests_preempted(
    engines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, peer = lend(engines, 8 * MiB)
    asked: list[str] = []
    whole = engine.controller._serve_if_safe

    def serve() -> None:
        asked.extend(demand.rung for demand in engine.controller._demands)
        whole()

    monkeypatch.setattr(engine.controller, "_serve_if_safe", serve)
    assert refused(peer, CHUNK, timeout=0.3)
    assert asked == ["evict", "shrink", "pause"]


def test_a_debt_is_forgotten_when_who_asked_has_given_up(lent: tuple[Engine, Any]) -> None:
    engine, peer = lent
    assert refused(peer, CHUNK, timeout=0.05)

    def over() -> bool:
        engine.step()
        return not engine.controller.draining

    assert comes_true(over)
    end(engine, 8, 9)
    engine.step()
    assert engine.balloon.parked == 0


def test_an_engine_without_requests_owes_nothing(lent: tuple[Engine, Any]) -> None:
    engine, _ = lent
    engine.controller._asked("shrink", 2 * BLOCKS * MiB, LONG)
    assert engine.controller.draining
    end(engine, *range(1, BLOCKS))
    engine.step()
    assert not engine.controller.draining
    assert engine.cache.resident_bytes == CHUNK


def test_what_running_requests_are_about_to_take_is_left_to_them_unless_they_may_be_preempted(
    full: Engine,
) -> None:
    full.hold(1)
    full.needs = Needs(5, 5, 9)
    full.cache.account.set_limits(high=CHUNK, timeout=LONG)  # asks "evict" alone
    assert full.balloon.free_blocks in (9, 10), "what waits may be admitted"
    full.controller._asked("shrink", 15 * CHUNK, LONG)
    assert full.balloon.free_blocks in (5, 6)
    full.pressing.grow(15 * CHUNK, timeout=LONG)
    assert full.balloon.free_blocks == 0


def test_nothing_grows_while_it_drains(lent: tuple[Engine, Any]) -> None:
    engine, peer = lent
    assert refused(peer, 2 * CHUNK)
    end(engine, 8, 9)
    engine.step()
    assert engine.balloon.parked == 1
    engine.step(needed=4, ahead=4)
    assert engine.controller.grower.coming == []


def test_while_it_drains_running_requests_go_on_and_waiting_ones_wait() -> None:
    plain, drained = facts("plain_few"), facts("drained")
    assert drained["tokens"] == plain["tokens"]
    told = drained["drained"]
    assert told["admitted"] == told["preempted"] == []
    assert told["running"][0] == 14 > told["running"][-1]
    assert told["resident"][-1] < told["resident"][0]
