"""Ranks grow together or not at all, give up the same chunks, and each behind its own stream's work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch_elastic_mem as tem
from tests.arena.watch import comes_true
from tests.rungs import Rung
from tests.vllm.small_ranks import BLOCKS, CHUNK, Engine, MiB, engine_on, together
from torch_elastic_mem.integrations.vllm import line
from torch_elastic_mem.integrations.vllm.worker import Elastic

ALL = BLOCKS * MiB
KiB = 1 << 10
Made = Callable[..., Engine]


@pytest.fixture
def engine(rung: Rung, made: list[Engine]) -> Engine:
    """Both ranks have room for all."""
    made.append(engine_on(rung, ALL, ALL))
    return made[-1]


def test_what_grows_has_memory_on_every_rank(engine: Engine) -> None:
    engine.ranks.ensure([1, 5])
    assert engine.chunks() == [[1, 5], [1, 5]]


def test_where_one_rank_is_refused_none_grows(rung: Rung, made: list[Engine]) -> None:
    made.append(engine_on(rung, ALL, 2 * CHUNK))
    ranks = made[-1].ranks
    ranks.ensure([1])
    with pytest.raises(tem.OutOfMemory, match="rank 1 of 2 was refused, so none grows"):
        ranks.ensure([2, 3])
    assert comes_true(lambda: made[-1].chunks() == [[1], [1]])
    ranks.ensure([2])
    assert made[-1].chunks() == [[1, 2], [1, 2]]


def test_an_idle_engine_gives_at_once(engine: Engine) -> None:
    engine.ranks.ensure([1, 2])
    engine.release(1)
    assert comes_true(lambda: engine.chunks() == [[2], [2]])


def test_memory_goes_on_each_rank_when_its_own_stream_has_the_step(engine: Engine) -> None:
    first, second = engine.ones
    engine.ranks.ensure([1, 2])
    number = engine.schedule()
    engine.release(1)
    first.step(number)
    assert comes_true(lambda: first.chunks() == [2])
    second.step(number, enqueued=False)
    assert second.chunks() == [1, 2]
    second.rank.step_enqueued()
    assert second.chunks() == [2]


def test_of_several_steps_in_flight_the_last_is_waited_for(engine: Engine) -> None:
    first, _ = engine.ones
    engine.ranks.ensure([1])
    one, two = engine.schedule(), engine.schedule()
    engine.release(1)
    engine.schedule()
    first.step(one)
    first.step(two, enqueued=False)
    assert first.chunks() == [1]
    first.rank.step_enqueued()
    assert first.chunks() == []


def test_a_step_that_begins_says_that_those_before_are_on_the_stream(engine: Engine) -> None:
    first, _ = engine.ones
    engine.ranks.ensure([1])
    number = engine.schedule()
    engine.release(1)
    first.step(number, enqueued=False)
    assert first.chunks() == [1]
    first.step(engine.schedule(), enqueued=False)
    assert first.chunks() == []


def test_a_chunk_that_is_to_come_again_goes_first(engine: Engine) -> None:
    engine.ranks.ensure([1])
    number = engine.schedule()
    engine.release(1)
    growing = threading.Thread(target=engine.ranks.ensure, args=([1],))
    growing.start()
    assert comes_true(lambda: engine.ones[0].rank._growths.empty() and growing.is_alive())
    for each in engine.ones:
        each.step(number)
    growing.join()
    assert engine.chunks() == [[1], [1]]
    engine.release(1)
    assert comes_true(lambda: engine.chunks() == [[], []]), "no release is left that takes it later"


def test_a_step_that_is_numbered_need_not_be_waited_for(engine: Engine) -> None:
    told: list[int] = []
    engine.ranks.on_enqueued = lambda: told.append(1)
    engine.schedule()
    assert told == [1]


def gives(engine: Engine, asked: list[float]) -> Callable[[int, float], None]:
    """A scheduler all of whose chunks have memory, and that gives the last first."""
    engine.ranks.ensure(range(BLOCKS // 2))
    left = list(range(BLOCKS // 2))

    def give(nbytes: int, timeout: float) -> None:
        asked.append(nbytes)
        engine.ranks.release([left.pop() for _ in range(-(-nbytes // engine.ranks.freed_bytes))])

    return give


def test_a_demand_on_one_rank_is_met_by_all(engine: Engine) -> None:
    first, second = engine.ones
    asked: list[float] = []
    engine.ranks.account.on_reclaim(gives(engine, asked), "evict")
    assert comes_true(lambda: len(second.rank._reclaimers) == 1)
    memory = second.pressing()
    memory.grow(3 * CHUNK, timeout=60)
    assert asked == [3]
    kept = list(range(BLOCKS // 2 - 3))
    assert second.chunks() == kept
    assert comes_true(lambda: first.chunks() == kept)


def test_a_demand_waits_for_what_goes_behind_a_step(engine: Engine) -> None:
    first, _ = engine.ones
    engine.ranks.on_reclaim(gives(engine, []), "evict")
    assert comes_true(lambda: len(first.rank._reclaimers) == 1)
    number = engine.schedule()
    memory = first.pressing()
    growing = threading.Thread(target=memory.grow, args=(CHUNK,), kwargs={"timeout": 60})
    growing.start()
    assert comes_true(lambda: len(first.rank._due) == 1)
    assert growing.is_alive()
    first.step(number)
    growing.join()
    assert memory.mapped == CHUNK


def test_ranks_that_are_asked_at_once_give_the_same_bytes(engine: Engine) -> None:
    first, second = engine.ones
    asked: list[float] = []
    give, both = gives(engine, asked), threading.Event()

    def give_when_both_have_asked(nbytes: int, timeout: float) -> None:
        assert both.wait(60)
        give(nbytes, timeout)

    engine.ranks.on_reclaim(give_when_both_have_asked, "evict")

    def let_on() -> None:
        comes_true(lambda: bool(first.rank._open and second.rank._open))
        both.set()

    together(
        lambda: first.rank._asked("evict", 3 * CHUNK, 60.0),
        lambda: second.rank._asked("evict", 3 * CHUNK, 60.0),
        let_on,
    )
    assert asked == [3]
    assert comes_true(lambda: [len(each) for each in engine.chunks()] == [BLOCKS // 2 - 3] * 2)


def test_what_a_rank_is_about_to_give_is_for_a_demand_that_comes_meanwhile(engine: Engine) -> None:
    first, second = engine.ones
    asked: list[float] = []
    engine.ranks.on_reclaim(gives(engine, asked), "evict")
    number = engine.schedule()
    demands = [
        threading.Thread(target=each.rank._asked, args=("evict", 3 * CHUNK, 60.0)) for each in engine.ones
    ]
    demands[0].start()
    assert comes_true(lambda: second.heard == 3)
    demands[1].start()
    assert comes_true(lambda: second.rank._demands == 1)
    # One more here is for somebody else.
    more = threading.Thread(target=second.rank._asked, args=("evict", CHUNK, 60.0))
    more.start()
    assert comes_true(lambda: first.heard == second.heard == 4) and asked == [3, 1]
    assert len(first.chunks()) == len(second.chunks()) == BLOCKS // 2, "behind the step"
    for each in engine.ones:
        each.step(number)
    for each in (*demands, more):
        each.join()
    assert asked == [3, 1]
    assert [len(each) for each in engine.chunks()] == [BLOCKS // 2 - 4] * 2


def test_a_demand_has_a_growth_come_to_nothing_that_one_rank_waits_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = engine.ones
    plain, got = second.cache.ensure, threading.Event()

    def ensure_later(*args: Any) -> None:
        assert got.wait(60)
        plain(*args)

    monkeypatch.setattr(second.cache, "ensure", ensure_later)
    engine.ranks.on_reclaim(lambda nbytes, timeout: None, "evict")
    refused: list[str] = []

    def grow() -> None:
        with pytest.raises(tem.OutOfMemory) as reason:
            engine.ranks.ensure([1, 2])
        refused.append(str(reason.value))

    growing = threading.Thread(target=grow)
    growing.start()
    assert comes_true(lambda: first.chunks() == [1, 2])
    first.rank._asked("evict", CHUNK, 60.0)
    assert first.chunks() == [], "it does not wait for the other rank"
    got.set()
    growing.join()
    assert refused == ["somebody else was given what the engine was about to take"]
    assert comes_true(lambda: engine.chunks() == [[], []]), "the other rank may hear of it later"


def test_demands_of_one_rank_add_up(engine: Engine) -> None:
    first, _ = engine.ones
    engine.ranks.on_reclaim(gives(engine, []), "evict")
    together(*[lambda: first.rank._asked("evict", 2 * CHUNK, 60.0)] * 3)
    assert len(first.chunks()) == BLOCKS // 2 - 6
    first.rank._asked("evict", CHUNK, 60.0)
    assert len(first.chunks()) == BLOCKS // 2 - 7, "nor is one counted that has been met"


def test_at_its_own_limit_a_rank_is_not_asked_for_what_it_wants(engine: Engine) -> None:
    asked: list[float] = []
    engine.ranks.on_reclaim(lambda nbytes, timeout: asked.append(nbytes), "pause")
    assert comes_true(lambda: all(each.rank._reclaimers for each in engine.ones))
    engine.ranks.ensure([1, 2])
    engine.ones[0].cache.account.set_limits(max=2 * CHUNK)
    with pytest.raises(tem.OutOfMemory, match="max is 4 MiB"):
        engine.ranks.ensure([3])
    assert comes_true(lambda: engine.chunks() == [[1, 2], [1, 2]]), "what the other one got has gone"
    assert asked == []


def test_at_its_own_limit_what_is_cached_makes_room_for_the_growth_that_asks(engine: Engine) -> None:
    engine.ranks.on_reclaim(lambda nbytes, timeout: engine.ranks.release([1]), "evict")
    assert comes_true(lambda: all(each.rank._reclaimers for each in engine.ones))
    engine.ranks.ensure([1, 2])
    for each in engine.ones:
        each.cache.account.set_limits(max=2 * CHUNK)
    engine.ranks.ensure([3], timeout=60)
    assert engine.chunks() == [[2, 3], [2, 3]]


def test_a_demand_does_not_call_off_what_waits_for_the_ranks_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, on = threading.Event(), threading.Event()
    plain = engine.ones[1].rank._refusal

    def refusal(order: line.Grow) -> str | None:
        slow.set()
        assert on.wait(60)
        return plain(order)

    monkeypatch.setattr(engine.ones[1].rank, "_refusal", refusal)
    settled: list[bool] = []
    settling = threading.Thread(target=lambda: settled.append(engine.ranks.settle() is None))
    settling.start()
    assert slow.wait(60)
    engine.ranks.call_off()
    on.set()
    settling.join()
    assert settled == [True]


def test_what_a_demand_did_not_get_is_not_owed_to_the_next(engine: Engine) -> None:
    first, _ = engine.ones
    asked: list[float] = []
    engine.ranks.on_reclaim(lambda nbytes, timeout: asked.append(nbytes), "evict")
    first.rank._asked("evict", 5 * CHUNK, 60.0)
    first.rank._asked("evict", 2 * CHUNK, 60.0)
    assert asked == [5, 2]


def test_what_is_in_the_blocks_is_said_on_every_rank(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []

    def note(account: tem.Account, *counts: int) -> None:
        told.append((account.name, sum(counts)))

    monkeypatch.setattr(tem.Account, "note_blocks", note)
    engine.ranks.account.note_blocks(1, 2, 3, 4)
    assert comes_true(lambda: told == [("engine", 10)] * 2)


def test_an_engine_that_has_lost_a_rank_does_not_grow(engine: Engine) -> None:
    engine.ones[1].rank.close()
    with pytest.raises(tem.OutOfMemory, match="a rank of the engine has ended"):
        engine.ranks.ensure([1])


def test_a_rank_that_cannot_carry_out_an_order_is_lost_and_not_waited_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(message: line.Message) -> None:
        raise ValueError(message)

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine.ones[1].rank, "_heed", fail)
    with pytest.raises(tem.OutOfMemory, match="a rank of the engine has ended"):
        engine.ranks.ensure([1])


def test_a_demand_on_a_rank_whose_scheduler_has_gone_ends(engine: Engine) -> None:
    first, _ = engine.ones
    engine.ranks.on_reclaim(lambda nbytes, timeout: engine.ranks.close(), "evict")
    first.rank._asked("evict", CHUNK, 600.0)
    assert first.rank._closed


def test_a_step_of_the_warm_up_has_no_number_and_is_not_counted() -> None:
    begun: list[int] = []

    class Plain:
        def execute_model(self, _: Any) -> None:
            """As vLLM's: sampling follows."""

    class Worker(Elastic, Plain):
        elastic_rank: Any = SimpleNamespace(step_begins=begun.append)

    for step in (SimpleNamespace(), SimpleNamespace(elastic_step=1)):
        Worker().execute_model(step)
    assert begun == [1]
