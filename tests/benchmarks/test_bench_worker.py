import io
import json
import sys

import pytest

from benchmarks import contenders, worker
from benchmarks.worker import Worker, WorkerError, take_turns


class Fake:
    def __init__(self, order, name, fails_at=None):
        self.order, self.name, self.fails_at = order, name, fails_at
        self.asked = 0

    def ask(self, request):
        self.order.append(self.name)
        self.asked += 1
        if self.asked == self.fails_at:
            raise WorkerError(f"{self.name}: it broke")
        return request["value"] + self.asked


def test_workers_take_turns_and_the_first_round_is_not_kept():
    order = []
    workers = {name: Fake(order, name) for name in "abc"}
    turns = take_turns(workers, {"value": 10}, 2, label="test")
    assert "".join(order) == "abcabcabc"
    assert turns.answers == {name: [12, 13] for name in "abc"}
    assert turns.failures == {}


def test_a_worker_that_fails_is_left_out_and_named():
    order = []
    workers = {"a": Fake(order, "a", fails_at=2), "b": Fake(order, "b")}
    turns = take_turns(workers, {"value": 0}, 2, label="test")
    assert "".join(order) == "ababb"
    assert turns.answers == {"b": [2, 3]}
    assert turns.failures == {"a": "a: it broke"}


def test_a_process_that_ends_is_an_error_and_not_a_wait():
    with (
        Worker("no_such_module", "native", "host") as gone,
        pytest.raises(WorkerError, match="native: its process ended with code 1"),
    ):
        gone.ask({})


def test_answers_and_errors_come_back_in_order(monkeypatch, capfd):
    requests = "".join(json.dumps({"n": n}) + "\n" for n in (1, 0, 4))
    monkeypatch.setattr(sys, "argv", ["worker", "ours", "host"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(requests))

    def make(contender, backend):
        print("a library that prints")
        assert (contender, backend) == ("ours", "host")
        return lambda request: 8 // request["n"]

    kept = worker.os.dup(1)
    try:
        worker.serve(make)
    finally:
        worker.os.dup2(kept, 1)
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert [answer.get("value") for answer in answers] == [8, None, 2]
    assert answers[1]["error"].startswith("ZeroDivisionError")


def test_only_one_contender_has_expandable_segments(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    found = {name: contenders.environment(name) for name in contenders.ON_CUDA}
    assert found["expandable"]["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("native", "ours"):
        assert "PYTORCH_ALLOC_CONF" not in found[name]
    assert all("PYTORCH_CUDA_ALLOC_CONF" not in variables for variables in found.values())
