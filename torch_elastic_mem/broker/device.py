"""A device as its tenants and its driver describe it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch_elastic_mem.broker.device_view import Reading
from torch_elastic_mem.broker.holder import Holder

# A grant is charged before its memory exists, so one look may see too little outside. The figure rises at
# once and falls when so many looks have seen less.
LOOKS = 20


@dataclass(slots=True, eq=False)
class Device:
    """A device that is shared out. Sizes are bytes.

    Attributes:
        limit: what may be shared out at most, the reserve included.
        used: on the device, as last seen; None where it has not been seen.
    """

    uuid: str
    label: str
    backend: str
    total: int
    limit: int
    used: int | None = None
    processes: dict[int, int] | None = None
    met: set[int] = field(default_factory=set)
    _outside: deque[int] = field(default_factory=lambda: deque(maxlen=LOOKS))

    @property
    def names(self) -> tuple[str, ...]:
        """What an operator may call it."""
        return self.uuid, self.label

    @property
    def outside(self) -> int:
        """What others hold."""
        return max(self._outside, default=0)

    @property
    def most(self) -> int:
        """What can be shared out when no others hold anything."""
        return min(self.limit, self.total)

    @property
    def capacity(self) -> int:
        """What can be shared out now."""
        return min(self.limit, self.total - self.outside)

    def look(self, reading: Reading, holders: Iterable[Holder], between: int = 0) -> None:
        """Takes in what the device shows; `between` bytes are on their way from one holder to another.

        With bytes by process, what a tenant has beside its lease is outside too.
        """
        self.used, self.processes = reading.used, reading.processes
        leases: dict[int, int] = {}
        for holder in holders:
            pid = holder.session.process.pid
            leases[pid] = leases.get(pid, 0) + holder.lease
        if reading.processes is None:
            ours = sum(leases.values())
        else:
            ours = sum(min(lease, reading.processes.get(pid, lease)) for pid, lease in leases.items())
            self.met |= leases.keys() & reading.processes.keys()
        self._outside.append(max(0, reading.used - ours - between))

    def recognise(self, bytes: int) -> None:
        """What looked like outside is a tenant's that has come back."""
        self._outside = deque((max(0, each - bytes) for each in self._outside), LOOKS)

    def shows_gone(self, holder: Holder) -> bool:
        """The memory of a process that has died is seen to be free."""
        if self.used is None:
            return self.backend == "host"
        pid = holder.session.process.pid
        if self.processes is not None and pid in self.met:
            return pid not in self.processes
        return holder.used_at_death - self.used >= holder.lease
