"""The accounts of one device and their ledger."""

from __future__ import annotations

from torch_elastic_mem import _C
from torch_elastic_mem.broker.heir import Heir
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.protocol import UNLIMITED, Limits
from torch_elastic_mem.broker.rules import for_ledger
from torch_elastic_mem.broker.session import Session
from torch_elastic_mem.errors import AdmissionError, InvalidArgument

# Of one arena.
MOST_ACCOUNTS = 256


class Accounts:
    """Who holds what of a device. Sizes are bytes."""

    def __init__(self, capacity: int, reserve_low: int, reserve_high: int) -> None:
        self.ledger = _C.Ledger(capacity, reserve_low)
        self.till = _C.Till(self.ledger)
        self.reserve_low = reserve_low
        self.reserve_high = reserve_high
        self.holders: dict[int, Holder] = {}
        # By the number of the account whose bytes they take over.
        self.heirs: dict[int, Heir] = {}

    @property
    def above_low(self) -> int:
        """What free memory has above the lower mark when it is at the upper one."""
        return self.reserve_high - self.reserve_low

    @property
    def owing(self) -> bool:
        """An account is of a process that owes an answer, be it on another device."""
        return any(holder.session.process.debts for holder in self.holders.values())

    def open(
        self, session: Session, name: str, priority: str, wanted: Limits, forced: tuple[str, Limits]
    ) -> Holder:
        """Opens an account with the limits in force.

        Raises:
            InvalidArgument: the connection has one of that name, or the limits contradict each other.
            AdmissionError: the `min` does not fit.
        """
        mine = {each.name for each in self.holders.values() if each.session is session}
        if len(mine) >= MOST_ACCOUNTS:
            raise InvalidArgument(f"account '{name}' would be one more than {MOST_ACCOUNTS}; close some")
        if name in mine:
            raise InvalidArgument(f"account '{name}' exists already; names are unique within an arena")
        title = f"{name}/{session.process.pid}"
        # Two arenas of a process may have an account of one name each.
        taken = {each.ledger_name for each in self.holders.values()}
        unique = (
            title
            if title not in taken
            else next(
                candidate
                for number in range(2, len(taken) + 3)
                if (candidate := f"{title}#{number}") not in taken
            )
        )
        number = self.ledger.open(unique, for_ledger(forced[1]))
        holder = Holder(self.ledger, number, name, session, priority, wanted, *forced, ledger_name=unique)
        self.holders[number] = holder
        self._seat(holder)
        return holder

    def close(self, holder: Holder) -> None:
        """Closes an account that holds nothing; see `discharge`."""
        self.till.dismiss(holder.id)
        self.ledger.close(holder.id)
        del self.holders[holder.id]

    def set_limits(self, holder: Holder, priority: str, limits: Limits) -> None:
        """Puts limits in force.

        Raises:
            InvalidArgument, AdmissionError: as for `open`. Nothing was changed.
        """
        self.ledger.set_limits(holder.id, for_ledger(limits))
        holder.priority, holder.limits = priority, limits

    def set_capacity(self, capacity: int) -> None:
        """Follows the device. What has been promised by `min` stays promised."""
        promised = sum(holder.limits.min for holder in self.holders.values())
        capacity = max(capacity, promised + self.reserve_low, self.reserve_low + 1)
        if (capacity, capacity - self.reserve_low) != (self.ledger.capacity, self.ledger.leasable):
            self.ledger.set_capacity(capacity, self.reserve_low)

    def lease(self, holder: Holder, bytes: int) -> bool:
        """Grants if there is room, behind the queue."""
        return self.ledger.grant(holder.id, bytes)

    def charge(self, holder: Holder, bytes: int) -> None:
        """Grants what is held already."""
        self.ledger.charge(holder.id, bytes)

    def discharge(self, holder: Holder, bytes: int) -> None:
        """Takes lease back. What is shared passes to the share's own account.

        Raises:
            InvalidArgument: it is more than the account's.
        """
        self.ledger.give_back(holder.id, bytes)
        if heir := self.heirs.get(holder.id):
            self.charge(heir, heir.inherits(holder.lease))

    def kept_free(self, holder: Holder, bytes: int) -> int:
        """Bytes that such a grant must leave free: memory between the marks is for classes above the lowest.

        The lowest is the lowest of those that hold memory, and what `min` guarantees is everybody's.
        """
        if not self.above_low or holder.lease + bytes <= holder.limits.min:
            return 0
        return 0 if self.ledger.holds_below(holder.limits.value) else self.above_low

    def own_room(self, holder: Holder) -> int:
        """Bytes below the account's `max`."""
        most = holder.limits.max
        return UNLIMITED if most == UNLIMITED else max(0, most - holder.lease)

    def reopen(self, holder: Holder, session: Session, lease: int) -> None:
        """Gives a lost account to the connection that its process has come back with.

        Raises:
            InvalidArgument: it says that it holds more than it was granted.
        """
        if lease > holder.lease:
            raise InvalidArgument(
                f"account '{holder.name}' comes back with a lease of {lease} bytes; it was granted "
                f"{holder.lease}"
            )
        self.discharge(holder, holder.lease - lease)
        holder.session, holder.connected = session, True
        holder.held = holder.idle = holder.rungs = 0
        self._seat(holder)

    def open_anyway(
        self, session: Session, name: str, priority: str, wanted: Limits, forced: tuple[str, Limits]
    ) -> Holder:
        """Opens an account of memory that is there already: without a `min` where it does not fit."""
        try:
            return self.open(session, name, priority, wanted, forced)
        except AdmissionError:
            return self.open(session, name, priority, wanted, (forced[0], forced[1]._replace(min=0)))

    def set_heir(self, number: int, heir: Heir | None) -> None:
        """What an account returns passes to an heir from now on; or no longer."""
        if heir is None:
            del self.heirs[number]
        else:
            self.heirs[number] = heir
        if (holder := self.holders.get(number)) is not None:
            self._seat(holder)

    def _seat(self, holder: Holder) -> None:
        """Has the till serve an account that can be spoken to and has no heir."""
        if holder.connected and holder.id not in self.heirs:
            self.till.admit(holder.id, holder.session.number, holder.session.granularity)
        else:
            self.till.dismiss(holder.id)
