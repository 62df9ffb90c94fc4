"""What is kept of a load, of an engine that is played."""

import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks.vllm.load import LONGEST, Arrival, drive

SLOW = 0.05


class Played:
    """Answers each request with one token a step; its third step is slow."""

    def __init__(self):
        self.left = {}
        self.steps = 0

    def add_request(self, name, prompt, sampling):
        self.left[name] = sampling.max_tokens

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        self.steps += 1
        time.sleep(SLOW * (self.steps == 3))
        names = list(self.left)
        self.left = {name: left - 1 for name, left in self.left.items() if left > 1}
        return [
            SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[self.steps])])
            for name in names
        ]


@pytest.fixture
def played(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    kind = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta"))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kind)
    return Played()


def test_the_longest_steps_are_kept_and_when_they_ended(played):
    arrivals = [Arrival(0.0, "a", [1, 2], 20), Arrival(0.001, "b", [3], 5)]
    seen = drive(played, arrivals, time.monotonic())
    assert seen.short == 0 and len(seen.ttft) == len(seen.tokens) == 2
    assert len(seen.longest) == LONGEST < played.steps
    ended, took = seen.longest[0]
    assert SLOW <= took <= ended <= seen.seconds
    assert [each[1] for each in seen.longest] == sorted((each[1] for each in seen.longest), reverse=True)


def test_a_request_that_gets_fewer_tokens_is_counted(played):
    assert drive(played, [Arrival(0.0, "a", [1], 3)], time.monotonic()).short == 0
    played.add_request = lambda name, prompt, sampling: played.left.update({name: 2})
    assert drive(played, [Arrival(0.0, "a", [1], 3)], time.monotonic()).short == 1
