"""What the demo looks like at one moment, and the history of a phase."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch_elastic_mem as tem
from torch_elastic_mem.demo.server import Server
from torch_elastic_mem.demo.tenant import TrainingTenant

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

    def __init__(self, arena: tem.Arena, tenant: TrainingTenant, server: Server) -> None:
        self._arena = arena
        self._tenant = tenant
        self._server = server
        self._seen = max((record.seq for record in arena.yields()), default=0)
        self.history = History(arena.capacity, time.monotonic_ns())

    def take(self) -> Sample:
        snapshot = self._arena.snapshot()
        accounts = {account.name: account for account in snapshot.accounts}
        training, serving = accounts["training"], accounts["serving"]
        samples = self.history.samples
        at, steps, tokens = self.history.seconds(), len(self._tenant.losses), self._server.tokens
        progress = self._tenant.progress
        before = next((old for old in reversed(samples) if at - old.at >= _RATE_SECONDS), None)
        spent = at - before.at if before else max(at, 1e-9)
        sample = Sample(
            at=at,
            training=training.held,
            training_idle=training.idle,
            serving=serving.held,
            serving_idle=serving.idle,
            free=snapshot.free,
            state=self._tenant.state,
            steps=steps,
            progress=progress,
            loss=self._tenant.losses[-1] if steps else None,
            tokens=tokens,
            running=self._server.running,
            waiting=self._server.waiting,
            abandoned=self._tenant.abandoned,
            steps_per_second=(progress - (before.progress if before else 0)) / spent,
            tokens_per_second=(tokens - (before.tokens if before else 0)) / spent,
        )
        samples.append(sample)
        for record in self._arena.yields(since=self._seen):
            if record.seq > self._seen:
                self._seen = record.seq
                if record.victim == "training" and record.given:
                    self.history.yields.append(record)
        return sample
