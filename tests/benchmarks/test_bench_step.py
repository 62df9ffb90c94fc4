"""bench_step: what a batch's steps took, and what of it is said."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.vllm import steady
from benchmarks.vllm.bench_step import tables, taken
from benchmarks.vllm.engine import OURS, STOCK
from benchmarks.vllm.steady import BEFORE, Batch, Steps
from benchmarks.worker import WorkerError

BATCH = Batch(requests=3, prompt=4, steps=5, vocabulary=100)


class Scheduler:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.running: list[str] = []
        self.ended = 0

    def has_requests(self) -> bool:
        return bool(self.running or self.ended)

    def schedule(self) -> str:
        self.calls.append("schedule")
        self.ended = 0
        return "what"

    def update_from_output(self, *, output: str) -> None:
        self.calls.append(f"update {output}")


class Worker:
    device = SimpleNamespace(type="cpu")

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def execute_model(self, step: str) -> None:
        self.calls.append(f"execute {step}")

    def sample_tokens(self, step: str) -> str:
        self.calls.append(f"sample {step}")
        return "output"


class Llm:
    """An engine of vLLM's that steps as one does; its requests end when they are aborted."""

    def __init__(self, scheduler: Scheduler, worker: Worker) -> None:
        self._scheduler, self._worker = scheduler, worker
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(batch_queue=None))
        self.longest = 1000
        self.steps = self.resets = 0

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def add_request(self, name: str, prompt: dict[str, list[int]], sampling: Any) -> None:
        assert sampling.max_tokens > BEFORE + BATCH.steps
        assert len(prompt["prompt_token_ids"]) == BATCH.prompt
        self._scheduler.running.append(name)

    def step(self) -> None:
        self.steps += 1
        step = self._scheduler.schedule()
        self._worker.execute_model(step)
        self._scheduler.update_from_output(output=self._worker.sample_tokens(step))
        if self.steps == self.longest:
            self._scheduler.running.pop()

    def abort_request(self, names: list[str]) -> None:
        assert self._scheduler.running == names
        self._scheduler.running, self._scheduler.ended = [], len(names)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    sampling = SimpleNamespace(SamplingParams=SimpleNamespace)
    kind = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA=1))
    monkeypatch.setitem(sys.modules, "vllm", sampling)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kind)
    calls: list[str] = []
    scheduler, worker = Scheduler(calls), Worker(calls)
    return SimpleNamespace(llm=Llm(scheduler, worker), scheduler=scheduler, worker=worker, calls=calls)


def test_a_batchs_steps_are_timed_whole_and_in_parts_and_nothing_of_it_is_left(engine: Any) -> None:
    steps = steady.run(engine, BATCH)
    assert len(steps.whole) == BATCH.steps and engine.llm.steps == BEFORE + BATCH.steps + 1
    assert set(steps.parts) == {"schedule", "launch", "sample", "update"}
    assert 0 < sum(steps.parts.values()) < max(steps.whole)
    assert (steps.work, steps.pause) == (None, None)
    assert not engine.scheduler.has_requests() and engine.llm.resets == 1


@pytest.mark.parametrize("at", [BEFORE, BEFORE + 2])
def test_steps_in_which_not_all_of_a_batch_decodes_are_refused(engine: Any, at: int) -> None:
    engine.llm.longest = at
    with pytest.raises(RuntimeError, match="2 of 3 requests decode"):
        steady.run(engine, BATCH)


def test_the_engine_is_called_as_before_while_it_is_timed_and_after(engine: Any) -> None:
    steady.run(engine, BATCH)
    engine.llm.step()
    each = ["schedule", "execute what", "sample what", "update output"]
    assert engine.calls == each * (BEFORE + BATCH.steps + 2)
    assert not {"schedule", "update_from_output"} & vars(engine.scheduler).keys()
    assert not {"execute_model", "sample_tokens"} & vars(engine.worker).keys()


def seen(step: float, **device: float) -> Steps:
    return Steps([step, step, 9.0], {"schedule": 20e-6, "launch": 1e-3}, **device)


def test_ours_is_held_against_stock_round_by_round() -> None:
    answers = {STOCK: [seen(0.005), *2 * [seen(0.010)]], OURS: [seen(0.0051), *2 * [seen(0.0102)]]}
    table, targets = tables({8: answers}, ["b failed: gone."])
    assert [row[:3] for row in table.rows] == [
        ["8 requests, stock", "10.000 ms", ""],
        ["8 requests, ours", "10.200 ms", "1.02 (1.02 to 1.02)"],
    ]
    assert table.note.endswith("b failed: gone.")
    assert targets.rows == [
        ["8 requests: a step over stock's", "1.020 (1.020 to 1.020)", "at most 1.01", "NO"]
    ]


def test_what_the_device_did_is_said_where_there_is_one() -> None:
    (row,) = tables({1: {STOCK: [seen(0.005, work=0.0047, pause=2e-6)]}}, [])[0].rows
    assert row == ["1 request, stock", "5.000 ms", "", "4,700 us", "2 us", "20 us", "1,000 us", "", ""]


class Contender:
    def __init__(self, name: str, ends: bool) -> None:
        self._name, self._ends = name, ends

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._ends and request["steps"]["requests"] == 8:
            raise WorkerError("gone")
        return {"whole": [0.005], "parts": {}}


def test_one_that_fails_is_named_and_takes_no_further_turn() -> None:
    workers: Any = {name: Contender(name, name == OURS) for name in (STOCK, OURS)}
    batches = [Batch(size, 4, 5, 100) for size in (1, 8, 64)]
    found, failed = taken(workers, batches, 2)
    assert failed == ["ours failed: gone."]
    assert {size: list(answers) for size, answers in found.items()} == {
        1: [STOCK, OURS],
        8: [STOCK],
        64: [STOCK],
    }
    assert [row[0] for row in tables(found, failed)[1].rows] == ["1 request: a step over stock's"]
