"""What is wanted of an engine, and what its own requests need."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Demand:
    """Bytes somebody wants of this engine, until a moment of the monotonic clock, and what that may cost."""

    nbytes: int
    rung: str
    deadline: float
    served: threading.Event = field(default_factory=threading.Event)
    since: float = field(default_factory=time.monotonic)
    over: bool = False  # who asked waits no longer

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())


@dataclass(frozen=True, slots=True)
class Needs:
    """Blocks that an engine's requests may take in the next step.

    Attributes:
        running: those that run.
        least: what is taken for sure, or a request is preempted, or nothing runs.
        most: those that run and those that may be admitted.
    """

    running: int
    least: int
    most: int
