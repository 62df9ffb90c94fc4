"""Who is on the other side: a process, and its connections."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from torch_elastic_mem.broker.protocol import Message


@dataclass(slots=True, eq=False)
class Process:
    """A process of the machine, as the kernel names it.

    Attributes:
        start: the clock tick it started at; with the pid it is unmistakable.
        debts: asks that it has not answered in time. It is granted nothing while there are any.
    """

    pid: int
    uid: int
    start: int
    debts: int = 0


@dataclass(slots=True, eq=False)
class Session:
    """A connection of a process, for its arena on one device.

    Attributes:
        name: what the process calls itself.
        granularity: what the arena's extents are a multiple of, in bytes.
        number: of this session and no other.
    """

    process: Process
    name: str
    granularity: int = 1
    number: int = field(default_factory=count(1).__next__)


# A message on its way out, with its request number.
Letter = tuple[Session, int, Message]
