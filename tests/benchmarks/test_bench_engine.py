"""bench_engine's rounds: who serves when, and what counts of a run that does not come to its end."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.vllm.bench_engine import Rounds
from benchmarks.vllm.engine import CONTROL, KVCACHED, OURS, STOCK
from benchmarks.vllm.engine_tables import SQUEEZED, tables
from benchmarks.vllm.engine_worker import Squeeze
from benchmarks.vllm.load import Load
from benchmarks.worker import WorkerError

LOADS = [Load(4.0, 8, 16, 16, 1, 100), Load(0.0, 8, 16, 16, 2, 100)]


class Contender:
    """Serves until its patience is at an end."""

    def __init__(self, name: str, asked: list[str], ends: tuple[int, type[BaseException]] | None) -> None:
        self._name, self._asked, self._ends = name, asked, ends
        self._served = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if "idle" in request:
            return {}
        self._served += 1
        if self._ends is not None and self._served > self._ends[0]:
            raise self._ends[1]("no more")
        self._asked.append(SQUEEZED if "squeeze" in request else self._name)
        return {"seed": request["load"]["seed"]}


def served(**ends: tuple[int, type[BaseException]]) -> tuple[Rounds, list[str]]:
    asked: list[str] = []
    workers: Any = {name: Contender(name, asked, ends.get(name)) for name in (STOCK, KVCACHED, OURS)}
    rounds = Rounds(workers, Squeeze(1, 1.0))
    rounds.run([LOADS[-1:], LOADS, LOADS])
    return rounds, asked


def counts(rounds: Rounds) -> list[dict[str, int]]:
    return [{name: len(seen) for name, seen in answers.items()} for answers in rounds.loads.values()]


def test_each_round_begins_with_another_contender() -> None:
    _, asked = served()
    names = [STOCK, KVCACHED, OURS, SQUEEZED]
    assert asked[:4] == names
    assert asked[4:12] == 2 * (names[1:] + names[:1])
    assert asked[12:] == 2 * (names[2:] + names[:2])


def test_contenders_stand_in_one_order_however_they_took_turns() -> None:
    rounds, _ = served()
    assert counts(rounds) == 2 * [dict.fromkeys([STOCK, KVCACHED, OURS, SQUEEZED], 2)]
    assert list(rounds.loads["4/s"]) == [STOCK, KVCACHED, OURS, SQUEEZED]


def test_one_that_fails_half_way_is_named_and_the_others_count() -> None:
    rounds, _ = served(kvcached=(4, WorkerError))
    assert list(rounds.failures) == [KVCACHED]
    assert counts(rounds) == [{STOCK: 2, KVCACHED: 2, OURS: 2, SQUEEZED: 2}, {STOCK: 2, OURS: 2, SQUEEZED: 2}]


@pytest.mark.parametrize(("turns", "whole"), [(3, [1, 1]), (4, [2, 1])])
def test_of_a_run_that_is_interrupted_whole_rounds_count(turns: int, whole: list[int]) -> None:
    rounds, _ = served(stock=(turns, KeyboardInterrupt))
    assert rounds.failures == {"the rest": "interrupted"}
    assert [set(each.values()) for each in counts(rounds)] == [{each} for each in whole]


def seen(slowest: float, between: float) -> dict[str, Any]:
    return {
        "ttft": [0.02] * 49 + [slowest],
        "tpot": [0.01] * 50,
        "itl": [0.005] * 99 + [between] * 2,
        "output_per_second": 100.0,
        "tokens": ["a"] * 50,
        "squeezes": [],
    }


def test_a_p99_is_of_all_rounds_requests_and_of_the_times_between_tokens_by_rounds() -> None:
    stock = [seen(0.05, 0.010), seen(0.02, 0.010)]
    ours = [seen(0.02, 0.010), seen(0.04, 0.020)]
    first, *_, targets = tables({"4/s": {STOCK: stock, OURS: ours}}, [], [])
    assert [row[3] for row in first.rows] == ["20.0 / 50.0 ms", "20.0 / 40.0 ms"]
    told = {row[0]: row[1] for row in targets.rows}
    assert told["4/s: TTFT p99 over stock"].startswith("0.800 (")
    assert told["4/s: TPOT p99 over stock"] == "1.000 (1.00 to 1.00)"
    assert told["4/s: ITL p99 over stock"] == "1.500 (1.25 to 1.75)"


def test_how_far_a_second_stock_engine_is_from_the_first_stands_beside_how_far_the_others_are() -> None:
    stock, again, ours = [seen(0.02, 0.010)], [seen(0.02, 0.011)], [seen(0.02, 0.012)]
    answers = {"4/s": {STOCK: stock, OURS: ours, CONTROL: again}}
    (beside,) = (each for each in tables(answers, [], []) if each.title == "Beside a second stock engine")
    assert beside.rows == [
        ["4/s, ours", "1.000", "1.000", "1.000", "1.200"],
        ["4/s, stock, again", "1.000", "1.000", "1.000", "1.100"],
    ]


def test_how_fast_each_engines_kernels_follow_one_another_is_told_where_it_is_known() -> None:
    rounds = [seen(0.02, 0.010) | {"kernel": kernel} for kernel in (0.8e-6, 1.0e-6, 0.9e-6)]
    unknown = [seen(0.02, 0.010) | {"kernel": None}] * 3
    found = tables({"4/s": {STOCK: rounds, OURS: unknown}}, [], [])
    (pace,) = (each for each in found if each.title == "From one kernel to the next")
    assert pace.rows == [["4/s, stock", "0.900 us", "0.800 to 1.000 us"]]
