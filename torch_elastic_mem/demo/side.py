"""One tenant as the demo directs it, wherever it runs; and one that runs in this process."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from torch_elastic_mem.demo.server import Request
from torch_elastic_mem.demo.stage import Stage
from torch_elastic_mem.demo.worker import Progress, Task, Worker


class TrainingMoment(msgspec.Struct, frozen=True):
    """Training at one moment. See `Sample`; `used` is what of its memory something lives in."""

    used: int = 0
    state: str = "starting"
    steps: int = 0
    progress: float = 0.0
    loss: float | None = None
    abandoned: int = 0


class ServingMoment(msgspec.Struct, frozen=True):
    """Serving at one moment. See `Sample`; `used` is what of its memory something lives in."""

    used: int = 0
    tokens: int = 0
    running: int = 0
    waiting: int = 0


class TrainingOutcome(msgspec.Struct, frozen=True):
    """What training leaves: values only. `let_go` was given without being asked, `regained` came back."""

    losses: list[float]
    abandoned: int
    spilled_bytes: int
    let_go: int
    regained: int


class ServingOutcome(msgspec.Struct, frozen=True):
    """What serving leaves: values only."""

    served: list[Request]
    preemptions: int
    compactions: int
    compacted_bytes: int


class ServedAgain(msgspec.Struct, frozen=True):
    """What serving with all memory gave, and of how many tokens decoding without a cache gives the same."""

    tokens: list[list[int]]
    uncached: int
    uncached_equal: int


Moment = TypeVar("Moment")
Outcome = TypeVar("Outcome")
Proof = TypeVar("Proof")
Moment_co = TypeVar("Moment_co", covariant=True)
Outcome_co = TypeVar("Outcome_co", covariant=True)
Proof_co = TypeVar("Proof_co", covariant=True)


class Side(Protocol[Moment_co, Outcome_co, Proof_co]):
    """A tenant with two acts, one after the other: the elastic phase, and the same again alone.

    All is called from one thread.
    """

    def play(self) -> None:
        """Begins the elastic phase."""

    def prove(self) -> None:
        """Begins to repeat what it did, once its outcome is there."""

    @property
    def running(self) -> bool:
        """Whether an act is under way."""

    def check(self) -> None:
        """Raises what an act has failed with."""

    def moment(self) -> Moment_co:
        """How the elastic phase stands."""

    def progress(self) -> list[Progress]:
        """How far the repetition is."""

    def finish(self) -> None:
        """Has the elastic phase end when it can."""

    def cancel(self) -> None:
        """Has an act end at once, and waits for that."""

    def outcome(self) -> Outcome_co:
        """Waits for the end of the elastic phase; returns what it left, or raises what it failed with."""

    def proof(self) -> Proof_co:
        """Waits for the end of the repetition, likewise."""


Training = Side[TrainingMoment, TrainingOutcome, list[float]]
Serving = Side[ServingMoment, ServingOutcome, ServedAgain]


class LocalSide(ABC, Generic[Moment, Outcome, Proof]):
    """A side whose acts run on a thread of this process."""

    name: str

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._stop = threading.Event()
        self._tasks: list[Task] = []
        self._worker: Worker[Any] | None = None
        self._outcome: Outcome | None = None

    def play(self) -> None:
        self._begin(Worker(f"tem-demo-{self.name}", self._play))

    def prove(self) -> None:
        outcome = self.outcome()
        self._stop = threading.Event()
        self._begin(Worker(f"tem-demo-{self.name}-again", lambda: self._prove(outcome)))

    def _begin(self, worker: Worker[Any]) -> None:
        self._worker = worker
        worker.start()

    @property
    def running(self) -> bool:
        return self._worker is not None and self._worker.is_alive()

    def check(self) -> None:
        if self._worker is not None and self._worker.error is not None:
            raise self._worker.error

    def progress(self) -> list[Progress]:
        return [task.progress() for task in self._tasks]

    def cancel(self) -> None:
        self._stop.set()
        self._halt()
        if self._worker is not None:
            self._worker.join()

    def outcome(self) -> Outcome:
        if self._outcome is None:
            assert self._worker is not None
            self._worker.result()
            self._outcome = self._left()
        return self._outcome

    def proof(self) -> Proof:
        assert self._worker is not None
        again: Proof = self._worker.result()
        return again

    @abstractmethod
    def moment(self) -> Moment: ...

    @abstractmethod
    def finish(self) -> None: ...

    @abstractmethod
    def _play(self) -> None: ...

    @abstractmethod
    def _halt(self) -> None:
        """Has `_play` end at once, if it runs."""

    @abstractmethod
    def _left(self) -> Outcome:
        """Takes the outcome after `_play`, and lets go of all that it made."""

    @abstractmethod
    def _prove(self, outcome: Outcome) -> Proof: ...
