"""The books of one device: who is granted memory, who is asked for it, and who waits.

Pure decisions. Every method takes the time, in seconds of the monotonic clock; what is to be sent is appended
to the post, and `wake` says when to call `settle`.
"""

from __future__ import annotations

import math
from contextlib import suppress

from torch_elastic_mem.broker.accounts import Accounts
from torch_elastic_mem.broker.asks import Asks
from torch_elastic_mem.broker.basket import Basket
from torch_elastic_mem.broker.config import Grant as Rights
from torch_elastic_mem.broker.config import LimitsConfig
from torch_elastic_mem.broker.demands import Demands
from torch_elastic_mem.broker.device import Device
from torch_elastic_mem.broker.device_state import device_state
from torch_elastic_mem.broker.device_view import Reading
from torch_elastic_mem.broker.grace import Grace
from torch_elastic_mem.broker.groups import Groups
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.journal import Journal
from torch_elastic_mem.broker.need import Need
from torch_elastic_mem.broker.pressure import Pressure
from torch_elastic_mem.broker.protocol import (
    LAST,
    Close,
    Demand,
    Done,
    Gave,
    Open,
    Opened,
    Pass,
    ProtocolError,
    Report,
    Return,
    Set,
    SetLimits,
)
from torch_elastic_mem.broker.queue import Queue
from torch_elastic_mem.broker.reclaim import Reclaim
from torch_elastic_mem.broker.rules import check_permitted, in_force
from torch_elastic_mem.broker.session import Letter, Process, Session
from torch_elastic_mem.broker.shares import Shares
from torch_elastic_mem.broker.state import DeviceState
from torch_elastic_mem.errors import AdmissionError, InUseError, InvalidArgument, TemError
from torch_elastic_mem.units import format_bytes

# The driver takes its time to free a dead process's memory; where nothing shows it, this is enough.
DYING = 1.0


class Books:
    """The books of one device.

    Attributes:
        rules: the operator's limits; the broker's own list, which it may change.
        grace: in which nothing is granted.
        accounts, shares, asks, demands: of the device; they change by methods of the books.
    """

    def __init__(
        self,
        device: Device,
        reserve: tuple[int, int],
        post: list[Letter],
        journal: Journal,
        groups: Groups,
        rules: list[LimitsConfig],
        grace: Grace,
    ) -> None:
        self.device = device
        self.rules = rules
        self.grace = grace
        self.accounts = Accounts(device.limit, *reserve)
        self.shares = Shares(self.accounts)
        self._post = post
        self._journal = journal
        self._pressure = Pressure()
        self.asks = Asks(device.uuid, post, journal)
        self._basket = Basket()
        self._queue = Queue(self.accounts, self._pressure)
        self._reclaim = Reclaim(self.accounts, self._queue, self.asks)
        self.demands = Demands(
            device, self.accounts, self._queue, self.asks, self._basket, groups, post, journal, grace
        )
        self._dying: list[tuple[Holder, float]] = []

    @property
    def stale(self) -> bool:
        """Another device's group has changed them, and `settle` is due."""
        return self.demands.stale

    @property
    def calm(self) -> bool:
        """Nobody waits for memory, none is on its way, and none is missing: `settle` has nothing to do."""
        ledger = self.accounts.ledger
        missing = ledger.overdrawn or ledger.free < self.accounts.above_low
        return not (missing or self._queue or self.asks or self._dying or self._reclaim.busy)

    # What processes say.

    def open(
        self, session: Session, request: int, message: Open, rights: Rights, trusted: bool, now: float
    ) -> None:
        """Opens an account, or takes back one that was lost.

        Args:
            session: its connection.
            request: the number to answer.
            message: what it wants.
            rights: of its user.
            trusted: the process may hold a lease that this broker has not granted.
            now: the time.

        Raises:
            TemError: it cannot be opened.
        """
        process = session.process
        title = f"{message.name}/{process.pid}"
        wanted = message.limits
        if not message.name:
            raise InvalidArgument("an account needs a name")
        check_permitted(message.name, wanted, rights)
        forced = in_force(message.name, title, self.device.names, message.priority, wanted, self.rules)
        lost = self._lost(process, message.name)
        if lost is not None:
            self.accounts.reopen(lost, session, message.lease)
            lost.wanted_priority, lost.wanted = message.priority, wanted
            # What it holds counts more than a `min` that has been promised to others since.
            with suppress(AdmissionError):
                self.accounts.set_limits(lost, *forced)
            holder = lost
        elif not message.lease:
            holder = self.accounts.open(session, message.name, message.priority, wanted, forced)
        elif not trusted or message.lease > self.device.total:
            raise InvalidArgument(
                f"account '{title}' says that it holds {format_bytes(message.lease)}, which this broker has "
                f"not granted; open it with no lease"
            )
        else:
            holder = self.accounts.open_anyway(session, message.name, message.priority, wanted, forced)
            self.accounts.charge(holder, message.lease)
            self.device.recognise(message.lease)
            self.accounts.set_capacity(self.device.capacity)
        self._post.append((session, request, Opened(holder.id, holder.limits)))
        self._note("join", holder, now)
        self.settle(now)

    def close(self, session: Session, request: int, message: Close, now: float) -> None:
        """Closes an account.

        Raises:
            InUseError: it holds bytes.
        """
        holder = self._of(session, message.account)
        if holder.lease:
            raise InUseError(
                f"account '{holder.title}' still holds a lease of {format_bytes(holder.lease)}; return it "
                f"first"
            )
        self._end(holder, "leave", now)
        self._post.append((session, request, Done()))
        self.settle(now)

    def set_limits(
        self, session: Session, request: int, message: SetLimits, rights: Rights, now: float
    ) -> None:
        """Changes what a process wants of its account.

        Raises:
            TemError: its user may not, or the limits cannot be.
        """
        holder = self._of(session, message.account)
        check_permitted(holder.name, message.limits, rights)
        previous, holder.wanted = holder.wanted, message.limits
        try:
            self._enforce(holder, now)
        except TemError:
            holder.wanted = previous
            raise
        self._post.append((session, request, Done()))
        self.settle(now)

    def demand(self, session: Session, request: int, message: Demand, now: float) -> None:
        """Grants, queues or denies a demand.

        Raises:
            ProtocolError: it cannot be one.
        """
        self.demands.demand(self._of(session, message.account), request, message, now)
        if self.stale or self.accounts.above_low:
            self.settle(now)

    def withdraw(self, session: Session, request: int, now: float) -> None:
        """Denies a demand that its process does not want any more."""
        self.demands.withdraw(session, request, now)
        self.settle(now)

    def give_back(self, session: Session, message: Return, now: float) -> None:
        """Takes lease back.

        Raises:
            ProtocolError: it is more than was granted.
        """
        holder = self._of(session, message.account)
        self._discharge(holder, message.bytes)
        self.asks.returned(holder, message.bytes, now)
        self.settle(now)

    def pass_on(self, session: Session, request: int, message: Pass) -> None:
        """Takes memory that is passed on with the GAVE to come.

        Raises:
            ProtocolError: it is too much at once, or nothing.
        """
        self._of(session, message.account)
        self._basket.offer(session, request, message)

    def gave(self, session: Session, request: int, message: Gave, now: float) -> None:
        """Takes an answer to an ASK.

        Raises:
            ProtocolError: it is more than was granted.
        """
        if not message.bytes and message.account not in self.accounts.holders:
            return  # the ASK crossed its CLOSE
        holder = self._of(session, message.account)
        self._discharge(holder, message.bytes)
        self._basket.accept(session, request, message.bytes)
        last = bool(message.flags & LAST)
        self.asks.answer(request, holder, message.bytes, message.coming, last, now)
        self.settle(now)

    def report(self, session: Session, message: Report) -> None:
        """Notes what an account has in use."""
        if message.account in self.accounts.holders:  # or this crossed its CLOSE
            self._of(session, message.account).report(message)

    # What happens to processes.

    def leave(self, session: Session, now: float) -> None:
        """The connection has said BYE: nothing is held."""
        for holder in self._holders(session):
            self._end(holder, "leave", now)
        self.settle(now)

    def lose(self, session: Session, now: float) -> None:
        """The connection has ended and the process may live: its bytes stay leased."""
        for holder in self._holders(session):
            holder.connected = False
            self._drop(holder, now)
        self.settle(now)

    def bury(self, process: Process, now: float) -> None:
        """The process is gone. Its bytes are leased again when they are seen to be free."""
        for holder in list(self.accounts.holders.values()):
            if holder.session.process is process and holder.died is None:
                holder.connected = False
                holder.died = now
                holder.used_at_death = self.device.used or 0
                self._drop(holder, now)
                self._dying.append((holder, now + DYING))
        self.settle(now)

    def look(self, reading: Reading, now: float) -> None:
        """Takes in what the device shows, and follows it."""
        self.device.look(reading, self.accounts.holders.values(), self._basket.bytes)
        self.accounts.set_capacity(self.device.capacity)
        self.settle(now)

    # What operators want.

    def enforce(self, now: float) -> int:
        """Puts the rules in force for present accounts and tells their processes. Returns how many changed.

        Raises:
            InvalidArgument, AdmissionError: for one of them they cannot be; those before it have changed.
        """
        changed = 0
        for holder in list(self.accounts.holders.values()):
            if self._enforce(holder, now):
                changed += 1
                if holder.connected:
                    self._post.append((holder.session, 0, Set(holder.id, holder.priority, holder.limits)))
        self.settle(now)
        return changed

    def reclaim(self, need: Need, holders: list[Holder], bytes: int, now: float) -> None:
        """Asks accounts for memory until `need` has gained it; see `settled`."""
        self._reclaim.order(need, holders, bytes)
        self.settle(now)

    def follow(self, limit: int, reserve: tuple[int, int], now: float) -> None:
        """Takes another capacity and other marks from the configuration."""
        self.device.limit = limit
        self.accounts.reserve_low, self.accounts.reserve_high = reserve
        self.accounts.set_capacity(self.device.capacity)
        self.settle(now)

    def settled(self, need: Need, now: float) -> bool:
        """No more will come of an operator's need."""
        return self._reclaim.settled(need, now)

    # Time.

    def wake(self, now: float) -> float:
        """When to call `settle` next; infinity for never."""
        if self.calm:
            return math.inf
        times = [*self._reclaim.times(now), *self.asks.times(now), *(until for _, until in self._dying)]
        for queued in self._queue:
            times.append(queued.deadline)
            if queued.holder.cool > now:
                times.append(queued.holder.cool)
        if self._queue and now < self.grace.until:
            times.append(self.grace.until)
        return min(times, default=math.inf)

    def settle(self, now: float) -> None:
        """Does what is due, and all that can be done now."""
        self.demands.stale = False
        if self.asks:
            self.asks.expire(now)
        if self._dying:
            self._bury_seen(now)
        if self._queue:
            self.demands.settle(now)
        if now >= self.grace.until:
            self._reclaim.pursue(now)
        # It is kept for nobody but those who wait.
        self._basket.shrink(self.accounts.ledger.free if self._queue else 0)

    def state(self, now: float) -> DeviceState:
        """The device at this moment."""
        return device_state(
            self.device, self.accounts, self.shares, self._queue, self.asks, self._pressure, now
        )

    # Bookkeeping.

    def _enforce(self, holder: Holder, now: float) -> bool:
        forced = in_force(
            holder.name, holder.title, self.device.names, holder.wanted_priority, holder.wanted, self.rules
        )
        if forced == (holder.priority, holder.limits):
            return False
        moved = forced[1].value != holder.limits.value
        self.accounts.set_limits(holder, *forced)
        self.demands.limit(holder, moved, now)
        self._note("limit", holder, now)
        return True

    def _drop(self, holder: Holder, now: float) -> None:
        """Nothing more is exchanged with an account's process."""
        self.accounts.till.dismiss(holder.id)
        self.asks.forget(holder)
        self._basket.forget(holder.session)
        self.demands.drop(holder, now)

    def _end(self, holder: Holder, kind: str, now: float) -> None:
        """Closes an account. What it held is free."""
        self._note(kind, holder, now)
        self._drop(holder, now)
        self.accounts.discharge(holder, holder.lease)
        self.accounts.close(holder)
        self._reclaim.forget(holder)

    def _bury_seen(self, now: float) -> None:
        for holder, until in list(self._dying):
            if now >= until or self.device.shows_gone(holder):
                self._dying.remove((holder, until))
                self._end(holder, "dead", now)

    def _discharge(self, holder: Holder, bytes: int) -> None:
        try:
            self.accounts.discharge(holder, bytes)
        except InvalidArgument as error:
            raise ProtocolError(str(error)) from None

    def _of(self, session: Session, number: int) -> Holder:
        holder = self.accounts.holders.get(number)
        if holder is None or holder.session is not session:
            raise ProtocolError(f"account {number} is none of this connection's")
        return holder

    def _holders(self, session: Session) -> list[Holder]:
        return [each for each in self.accounts.holders.values() if each.session is session]

    def _lost(self, process: Process, name: str) -> Holder | None:
        for holder in self.accounts.holders.values():
            same = holder.session.process is process and holder.name == name
            if same and not holder.connected and holder.died is None:
                return holder
        return None

    def _note(self, kind: str, holder: Holder, now: float) -> None:
        self._journal.add(kind, self.device.uuid, holder, now, now, bytes=holder.lease)
