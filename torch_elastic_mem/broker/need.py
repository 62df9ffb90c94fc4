"""Somebody who needs memory, and how far up the rungs others have been asked for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.protocol import EVICT, PAUSE, Demand

# Everybody has been asked for everything: how long until it is worth asking again.
FIRST_REST, LONGEST_REST = 0.1, 1.0
# An answer has half of the time that is left, so that others can be asked after it; a process that had less
# than the least would be a debtor for being scheduled late.
LEAST_ANSWER = 0.1
# For what has no deadline of its own.
UNHURRIED_ANSWER = 1.0


@dataclass(slots=True, eq=False)
class Need:
    """A reason to ask.

    Attributes:
        demander: who is behind it, in words for the one who is asked.
        top: the dearest rung; -1 asks nobody.
        start, deadline: seconds of the monotonic clock; nobody is asked after the deadline.
        rung: where it is now. exhausted: accounts that have no more to give there.
        rest_until: everybody is exhausted; it starts again at the first rung then.
    """

    demander: str
    top: int
    start: float
    deadline: float = math.inf
    rung: int = 0
    exhausted: set[int] = field(default_factory=set)
    rest_until: float = 0.0
    rests: int = 0
    gained: int = 0

    @property
    def patience(self) -> float:
        """Until when bytes behind fences are waited for, rather than dearer ones asked for."""
        return self.start + (self.deadline - self.start) / 2

    def takes_from(self, victim: Holder) -> bool:
        """Memory of the victim's can be passed on to who needs it: nobody sees what another user wrote."""
        return False

    def climb(self) -> bool:
        """Goes up a rung; False at the top."""
        if self.rung >= self.top:
            return False
        self.rung += 1
        self.exhausted.clear()
        return True

    def rest(self, now: float) -> None:
        """Starts again from below, after a while that doubles.

        What may ask only for what is cheap, and is over before it could ask again, is over now: meanwhile it
        would keep what is free from whoever needs it more, and who asks so briefly does without.
        """
        self.rest_until = now + min(LONGEST_REST, FIRST_REST * 2 ** min(self.rests, 8))
        if not self.rests and self.top <= EVICT and self.rest_until >= self.deadline:
            self.deadline = now
        self.rests += 1
        self.rung = 0
        self.exhausted.clear()

    def answer_time(self, now: float) -> float:
        """Seconds that who is asked now has for its last answer."""
        if self.deadline == math.inf:
            return UNHURRIED_ANSWER
        return max((self.deadline - now) / 2, LEAST_ANSWER)


def reserve_need(now: float) -> Need:
    """What keeps free memory at the upper mark."""
    return Need("reserve", EVICT, now)


def shrink_need(now: float) -> Need:
    """What brings leases back under a capacity that has fallen."""
    return Need("reserve", PAUSE, now)


@dataclass(slots=True, eq=False, kw_only=True)
class Queued(Need):
    """A demand that waits.

    Attributes:
        ticket: its place in the ledger's queue; 0 once its bytes are charged and its group is waited for.
        open: it is in the queue, or prepared.
        priority: the class that it waits in.
    """

    holder: Holder
    request: int
    demand: Demand
    ticket: int = 0
    open: bool = False
    priority: str = ""

    def takes_from(self, victim: Holder) -> bool:
        """As a need's. A group's memory is granted later, all at once."""
        return not self.demand.group and victim.session.process.uid == self.holder.session.process.uid

    @property
    def bytes(self) -> int:
        """The least that it takes."""
        return self.demand.bytes

    @property
    def order(self) -> tuple[int, int]:
        """Sorts as the ledger's queue: the higher class first, then the older."""
        return -self.holder.limits.value, self.ticket
