"""The demands of one device that wait, in the order in which they are granted."""

from __future__ import annotations

from collections.abc import Iterator

from torch_elastic_mem.broker.accounts import Accounts
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.need import Queued
from torch_elastic_mem.broker.pressure import Pressure


class Queue:
    """Demands with a ticket of the ledger, and those that are charged while their group is waited for."""

    def __init__(self, accounts: Accounts, pressure: Pressure) -> None:
        self._accounts = accounts
        self._pressure = pressure
        self.waiting: list[Queued] = []
        self.prepared: list[Queued] = []

    def __bool__(self) -> bool:
        return bool(self.waiting or self.prepared)

    def __iter__(self) -> Iterator[Queued]:
        yield from self.waiting
        yield from self.prepared

    @property
    def bytes(self) -> int:
        """Of all that have not been charged."""
        return sum(queued.bytes for queued in self.waiting)

    def of(self, holder: Holder) -> list[Queued]:
        """The demands of an account."""
        return [queued for queued in self if queued.holder is holder]

    def add(self, queued: Queued, now: float) -> None:
        """Queues a demand behind those of higher classes and the older of its own."""
        queued.ticket = self._accounts.ledger.enqueue(queued.holder.id, queued.bytes)
        self.waiting.append(queued)
        self.waiting.sort(key=lambda each: each.order)
        queued.open, queued.priority = True, queued.holder.priority
        self._pressure.begin(queued.priority, now)

    def requeue(self, holder: Holder) -> None:
        """Moves an account's demands to where its class is now, behind those that are there."""
        for queued in self.waiting:
            if queued.holder is holder:
                self._accounts.ledger.withdraw(queued.ticket)
                queued.ticket = self._accounts.ledger.enqueue(holder.id, queued.bytes)
        self.waiting.sort(key=lambda each: each.order)

    def remove(self, queued: Queued, now: float) -> None:
        """Takes a demand out, and gives back what is charged for it."""
        if queued.ticket:
            self._accounts.ledger.withdraw(queued.ticket)
            self.waiting.remove(queued)
        else:
            queued.holder.prepared -= queued.bytes
            self._accounts.discharge(queued.holder, queued.bytes)
            self.prepared.remove(queued)
        self._ended(queued, now)

    def charge(self, queued: Queued) -> bool:
        """Charges a demand if nothing is missing; it is prepared then."""
        if not self._accounts.ledger.grant_ticket(queued.ticket):
            return False
        queued.ticket = 0
        queued.holder.prepared += queued.bytes
        self.waiting.remove(queued)
        self.prepared.append(queued)
        return True

    def finish(self, queued: Queued, now: float) -> None:
        """A prepared demand is granted."""
        queued.holder.prepared -= queued.bytes
        self.prepared.remove(queued)
        self._ended(queued, now)

    def _ended(self, queued: Queued, now: float) -> None:
        queued.open = False
        self._pressure.end(queued.priority, now)

    def serve(self) -> Iterator[Queued]:
        """Charges every demand that nothing is missing for, first to last."""
        ledger = self._accounts.ledger
        ahead = 0
        for queued in list(self.waiting):
            if not queued.open:
                continue
            kept = self._accounts.kept_free(queued.holder, queued.bytes)
            if ledger.free >= ahead + queued.bytes + kept and self.charge(queued):
                yield queued
            else:
                ahead += queued.bytes

    def shortages(self) -> Iterator[tuple[Queued, int]]:
        """Each waiting demand, first to last, and what is missing for it and all before it together."""
        ledger = self._accounts.ledger
        needed = ledger.leased - ledger.leasable
        for queued in self.waiting:
            needed += queued.bytes
            yield queued, needed + self._accounts.kept_free(queued.holder, queued.bytes)
