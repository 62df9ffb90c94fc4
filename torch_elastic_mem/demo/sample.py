"""What the demo looks like at one moment, and the history of a phase."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch_elastic_mem as tem
from torch_elastic_mem.demo.pool import Pool
from torch_elastic_mem.demo.side import Serving, Training

_RATE_SECONDS = 2.0


@dataclass(frozen=True)
class Sample:
    """One moment. Sizes are bytes.

    Attributes:
        at: Seconds since the start.
        training_idle: What of `training` nothing lives in; `serving_idle` likewise.
        free: What no account holds.
        state: What training is doing.
        steps: Steps that training completed; `progress` counts those begun in part.
        loss: Of the last step.
        tokens: Tokens that were served.
        running: Requests that are being decoded.
        waiting: Requests that are not.
        abandoned: Micro-batches that training gave up, to make them again.
    """

    at: float
    training: int
    training_idle: int
    serving: int
    serving_idle: int
    free: int
    state: str
    steps: int
    progress: float
    loss: float | None
    tokens: int
    running: int
    waiting: int
    abandoned: int
    steps_per_second: float
    tokens_per_second: float


@dataclass(frozen=True)
class History:
    """All moments of a phase, and the yields of training in it. Values only: it may outlive the arena."""

    capacity: int
    begin_ns: int
    samples: list[Sample] = field(default_factory=list)
    yields: list[tem.YieldRecord] = field(default_factory=list)

    def seconds(self, now_ns: int | None = None) -> float:
        """Seconds from the start to now, or to a time of the same clock."""
        return ((time.monotonic_ns() if now_ns is None else now_ns) - self.begin_ns) / 1e9


class Recorder:
    """Takes the samples of a history. Calls come from one thread."""

    def __init__(self, pool: Pool, training: Training, serving: Serving) -> None:
        self._pool = pool
        self._training = training
        self._serving = serving
        self.history = History(pool.capacity, time.monotonic_ns())

    def take(self) -> Sample:
        training, serving, shares = self._training.moment(), self._serving.moment(), self._pool.shares()
        samples = self.history.samples
        at = self.history.seconds()
        before = next((old for old in reversed(samples) if at - old.at >= _RATE_SECONDS), None)
        spent = at - before.at if before else max(at, 1e-9)
        sample = Sample(
            at=at,
            training=shares.training,
            # The moments are not of quite the same time.
            training_idle=max(0, shares.training - training.used),
            serving=shares.serving,
            serving_idle=max(0, shares.serving - serving.used),
            free=shares.free,
            state=training.state,
            steps=training.steps,
            progress=training.progress,
            loss=training.loss,
            tokens=serving.tokens,
            running=serving.running,
            waiting=serving.waiting,
            abandoned=training.abandoned,
            steps_per_second=(training.progress - (before.progress if before else 0)) / spent,
            tokens_per_second=(serving.tokens - (before.tokens if before else 0)) / spent,
        )
        samples.append(sample)
        self.history.yields.extend(
            record for record in self._pool.yields() if record.victim == "training" and record.given
        )
        return sample
