"""Ranks fall asleep and wake up together, and where one does not, all are as they were."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch_elastic_mem as tem
from torch_elastic_mem.integrations.vllm.together import Together, attempt


class Cache:
    """The scheduler's side of a KV cache, which remembers what was done to it."""

    bytes = 1
    weights_away = False

    def __init__(self, *, away: bool = False) -> None:
        self.away = away
        self.refuses: type[Exception] | None = None

    def put_away(self) -> None:
        if self.refuses is not None:
            raise self.refuses("requests hold 3 of its blocks")
        self.away = True

    def bring_back(self, timeout: float) -> None:
        if self.refuses is not None:
            raise self.refuses("training holds all")
        self.away = False


class Ranks:
    """Two ranks' weights, and what they were asked for."""

    def __init__(self) -> None:
        self.resting: Cache | None = Cache()
        self.asleep = [False, False]
        self.refuses: dict[tuple[str, int], str] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.settled = 0

    def settle(self) -> None:
        self.settled += 1

    def ask(self, method: str, *args: object) -> Sequence[str | None]:
        self.asked.append((method, *args))
        answers = [self.refuses.get((method, rank)) for rank in range(2)]
        for rank, answer in enumerate(answers):
            if answer is None and method in ("sleep", "wake_up"):
                self.asleep[rank] = method == "sleep"
        return answers

    @property
    def state(self) -> tuple[bool, list[bool]]:
        assert self.resting is not None
        return self.resting.away, self.asleep


AWAKE = (False, [False, False])
ASLEEP = (True, [True, True])


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def together(ranks: Ranks) -> Together:
    return Together(ranks, ranks.ask)  # type: ignore[arg-type]


def test_all_sleep_and_all_wake(ranks: Ranks, together: Together) -> None:
    together.sleep(1)
    assert ranks.state == ASLEEP
    together.wake_up(None)
    assert ranks.state == AWAKE


def test_weights_go_when_the_cache_has_gone_on_every_rank(ranks: Ranks, together: Together) -> None:
    ranks.settle = lambda: ranks.asked.append(("settle",))  # type: ignore[method-assign]
    together.sleep(2)
    assert ranks.asked == [("settle",), ("sleep", 2)]


def test_where_requests_hold_blocks_no_rank_is_asked(ranks: Ranks, together: Together) -> None:
    assert ranks.resting is not None
    ranks.resting.refuses = tem.InUseError
    with pytest.raises(tem.InUseError, match="requests hold"):
        together.sleep(1)
    assert ranks.state == AWAKE and not ranks.asked


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("level", [1, 2])
def test_where_one_does_not_fall_asleep_all_are_awake(
    ranks: Ranks, together: Together, rank: int, level: int
) -> None:
    ranks.refuses["sleep", rank] = "a graph is captured"
    with pytest.raises(tem.InUseError, match=f"no rank falls asleep: rank {rank}: a graph") as refusal:
        together.sleep(level)
    assert ranks.state == AWAKE
    assert ("load them again" in str(refusal.value)) == (level == 2)
    ranks.refuses.clear()
    together.sleep(level)
    assert ranks.state == ASLEEP


def test_where_one_does_not_fall_asleep_and_another_does_not_wake_again_they_can_be_woken(
    ranks: Ranks, together: Together
) -> None:
    ranks.refuses = {("sleep", 1): "no memory can be pinned", ("wake_up", 0): "training holds all"}
    together.sleep(1)
    assert ranks.state == (True, [True, False])
    with pytest.raises(tem.OutOfMemory, match="sleeps on: rank 0: training holds all"):
        together.wake_up(None)
    assert ranks.state[0] and ranks.state[1][0]
    ranks.refuses.clear()
    together.wake_up(None)
    assert ranks.state == AWAKE


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("level", [1, 2])
def test_where_one_does_not_wake_all_sleep_on(
    ranks: Ranks, together: Together, rank: int, level: int
) -> None:
    together.sleep(level)
    ranks.refuses["wake_up", rank] = "training holds all"
    with pytest.raises(tem.OutOfMemory, match=f"sleeps on: rank {rank}: training holds all"):
        together.wake_up(None)
    assert ranks.state == ASLEEP
    assert ("sleep", level) in ranks.asked[1:]
    assert ranks.asked[-1] == ("cool_down_elastic_account",)
    ranks.refuses.clear()
    together.wake_up(None)
    assert ranks.state == AWAKE


def test_where_the_cache_cannot_come_back_no_weights_are_touched(ranks: Ranks, together: Together) -> None:
    together.sleep(1)
    assert ranks.resting is not None
    ranks.resting.refuses = tem.OutOfMemory
    with pytest.raises(tem.OutOfMemory, match="sleeps on: training holds all"):
        together.wake_up(None)
    assert ranks.state == ASLEEP
    assert ("wake_up", None) not in ranks.asked


@pytest.mark.parametrize("order", [["weights", "kv_cache"], ["kv_cache", "weights"]])
def test_a_partial_wake_brings_back_what_is_named(ranks: Ranks, together: Together, order: list[str]) -> None:
    together.sleep(1)
    together.wake_up(order[:1])
    assert ranks.state[0] == (order[0] != "kv_cache")
    assert ranks.resting is not None and ranks.resting.weights_away == (order[0] != "weights")
    together.wake_up(order[1:])
    assert ranks.state[0] is False
    assert ranks.asked[1:] == [("wake_up", order[:1]), ("wake_up", order[1:])]


def test_weights_that_are_awake_stay_so_where_the_cache_is_refused(ranks: Ranks, together: Together) -> None:
    together.sleep(1)
    together.wake_up(["weights"])
    assert ranks.resting is not None
    ranks.resting.refuses = tem.OutOfMemory
    with pytest.raises(tem.OutOfMemory):
        together.wake_up(["kv_cache"])
    assert ranks.state == (True, [False, False])


def test_the_cache_alone_may_go(ranks: Ranks, together: Together) -> None:
    together.discard(("kv_cache",))
    assert ranks.state == (True, [False, False])
    assert ranks.asked == [("discard", ("kv_cache",))]
    ranks.refuses["discard", 1] = "it is in use"
    with pytest.raises(tem.InUseError, match="rank 1: it is in use"):
        together.discard(("weights",))


def test_ranks_whose_cache_is_not_elastic_sleep_with_their_weights_alone(
    ranks: Ranks, together: Together
) -> None:
    ranks.resting = None
    together.sleep(1)
    together.wake_up(None)
    assert ranks.asked == [("sleep", 1), ("wake_up", None)]


def test_a_worker_that_fails_says_why_and_raises_nothing() -> None:
    class Worker:
        def sleep(self, level: int) -> None:
            raise tem.InUseError(f"level {level}")

        def wake_up(self, tags: object) -> None:
            raise ValueError

    assert attempt(Worker(), "sleep", 2) == "level 2"
    assert attempt(Worker(), "wake_up", None) == "ValueError()"


def test_vllm_may_name_the_arguments_or_not() -> None:
    from torch_elastic_mem.integrations.vllm.executor import ElasticExecutor

    asked: list[tuple[Any, ...]] = []
    executor = object.__new__(ElasticExecutor)
    executor.world_size = 2
    executor.elastic_together = SimpleNamespace(  # type: ignore[assignment]
        sleep=lambda *args, **named: asked.append(("sleep", args, named)),
        wake_up=lambda *args, **named: asked.append(("wake_up", args, named)),
    )
    assert executor.collective_rpc("sleep", None, (), {"level": 2}) == [None, None]
    assert executor.collective_rpc("sleep", kwargs={"level": 2}) == [None, None]
    assert executor.collective_rpc("wake_up", None, (["weights"],)) == [None, None]
    assert asked == [
        ("sleep", (), {"level": 2}),
        ("sleep", (), {"level": 2}),
        ("wake_up", (["weights"],), {}),
    ]
