"""An account of a process, as the broker's books have it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from torch_elastic_mem import _C
from torch_elastic_mem.broker.protocol import UNLIMITED, Limits, Report
from torch_elastic_mem.broker.session import Session
from torch_elastic_mem.broker.state import AccountState, BlocksState

# An account that has yielded to its class does not make its class yield for so long: else two that both want
# more than their share take the same bytes from each other in turn.
COOLING = 0.1
RECENT = 60.0


@dataclass(slots=True, eq=False)
class Holder:
    """An account and its figures. Times are seconds of the monotonic clock, sizes bytes.

    Attributes:
        ledger: who has its figures. id: its number there and on the wire.
        wanted: what its process asked for; `limits` are in force, with what the operator has set.
        ledger_name: what the ledger's messages call it.
        prepared: the part of its lease that its process has not been told of.
        held, idle, blocks: as last reported. rungs: a bit for each that it has reclaimers for.
        connected: its process can be spoken to. died: when the process was seen to be gone.
        cool: when it may make its own class yield again.
    """

    ledger: _C.Ledger
    id: int
    name: str
    session: Session
    wanted_priority: str
    wanted: Limits
    priority: str
    limits: Limits
    ledger_name: str = ""
    prepared: int = 0
    held: int = 0
    idle: int = 0
    rungs: int = 0
    blocks: BlocksState | None = None
    connected: bool = True
    died: float | None = None
    used_at_death: int = 0
    cool: float = 0.0
    given: int = 0
    taken: int = 0
    denied: int = 0
    yields: deque[tuple[float, float]] = field(default_factory=deque)

    @property
    def lease(self) -> int:
        """What is granted to it."""
        return self.ledger.held(self.id)

    @property
    def title(self) -> str:
        """What others call it: "account/pid"."""
        return f"{self.name}/{self.session.process.pid}"

    @property
    def can_answer(self) -> bool:
        """It can be asked for memory: somebody listens, and owes no answer."""
        return self.connected and not self.session.process.debts

    @property
    def spare(self) -> int:
        """What it could give: what its process knows of, above its `min`."""
        return max(0, self.lease - self.prepared - self.limits.min)

    def offers(self, rung: int) -> bool:
        """It may have something to give at the rung. Idle extents anybody may have."""
        return rung == 0 or bool(self.rungs >> rung & 1)

    def called(self, name: str) -> bool:
        """It is meant by an operator who says `name`."""
        return name in (self.name, self.title, self.priority)

    def report(self, said: Report) -> None:
        """Takes what its process says of it."""
        self.rungs, self.held, self.idle = said.rungs, said.held, said.idle
        blocks = BlocksState(said.in_use, said.cached, said.free, said.parked)
        self.blocks = blocks if any(msgspec.structs.astuple(blocks)) else None

    def note_yield(self, now: float, seconds: float) -> None:
        """Keeps how long it took to give."""
        self.yields.append((now, seconds))
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self.yields and self.yields[0][0] < now - RECENT:
            self.yields.popleft()

    def state(self, now: float, waiting: int, asked: bool, owed: int) -> AccountState:
        """Its figures at this moment."""
        self._forget(now)
        word = "debtor" if owed else "asked" if asked else "ok"
        if not self.connected:
            word = "lost" if self.died is None else "dying"
        limits = self.limits
        return AccountState(
            pid=self.session.process.pid,
            uid=self.session.process.uid,
            process=self.session.name,
            name=self.name,
            priority=self.priority,
            value=limits.value,
            lease=self.lease,
            held=self.held,
            idle=self.idle,
            min=limits.min,
            low=limits.low,
            high=None if limits.high == UNLIMITED else limits.high,
            max=None if limits.max == UNLIMITED else limits.max,
            weight=limits.weight,
            state=word,
            owed=owed,
            waiting=waiting,
            given=self.given,
            taken=self.taken,
            denied=self.denied,
            recent_yields=len(self.yields),
            slowest_yield=max((seconds for _, seconds in self.yields), default=0.0),
            blocks=self.blocks,
        )
