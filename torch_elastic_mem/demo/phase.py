"""The elastic phase: both tenants at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch_elastic_mem.demo.pair import Pair
from torch_elastic_mem.demo.sample import History, Recorder, Sample
from torch_elastic_mem.demo.side import ServingOutcome, TrainingOutcome

_SAMPLE_SECONDS = 0.05
# How much longer than asked a slow machine may take until its first step and its first yield.
_OVERTIME = 3


@dataclass(frozen=True)
class Outcome:
    """What the elastic phase left: values only, no tensor of an arena."""

    training: TrainingOutcome
    serving: ServingOutcome
    history: History
    seconds: float

    @property
    def given_bytes(self) -> int:
        """What training gave to demands, and what it let go when it was denied memory that serving had."""
        return self.training.let_go + sum(yielded.given for yielded in self.history.yields)

    @property
    def returned_bytes(self) -> int:
        return min(self.given_bytes, self.training.regained)


def run_elastic(pair: Pair, show: Callable[[History, Sample], None]) -> Outcome:
    """Trains and serves for as long as is set; `show` gets every sample on the calling thread."""
    training, serving, seconds = pair.training, pair.serving, pair.setting.seconds
    recorder = Recorder(pair.pool, training, serving)
    history = recorder.history

    def watch() -> Sample:
        time.sleep(_SAMPLE_SECONDS)
        training.check()
        serving.check()
        sample = recorder.take()
        show(history, sample)
        return sample

    training.play()
    serving.play()
    while True:
        sample = watch()
        shown = bool(sample.steps and history.yields)
        if history.seconds() >= seconds * (1 if shown else _OVERTIME):
            break
    serving.finish()
    while serving.running:
        watch()
    # Training ends last: with the burst gone, it finishes the step that it gave way in.
    training.finish()
    while training.running:
        watch()
    left = serving.outcome()
    outcome = Outcome(training.outcome(), left, history, history.seconds())
    show(history, recorder.take())
    return outcome
