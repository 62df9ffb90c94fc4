"""The books of one device: who is granted memory, who is asked for it, and who waits.

Pure decisions. Every method takes the time, in seconds of the monotonic clock; what is to be sent is appended to the
post, and `wake` says when to call `settle`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from torch_elastic_mem.broker.accounts import Accounts
from torch_elastic_mem.broker.asks import Asks
from torch_elastic_mem.broker.config import Grant as Rights
from torch_elastic_mem.broker.config import LimitsConfig
from torch_elastic_mem.broker.device import Device
from torch_elastic_mem.broker.device_view import Reading
from torch_elastic_mem.broker.groups import Groups
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.journal import Journal
from torch_elastic_mem.broker.need import Need, Queued, reserve_need, shrink_need
from torch_elastic_mem.broker.pressure import Pressure
from torch_elastic_mem.broker.protocol import (
    CLOSED,
    FREE_ONLY,
    INVALID,
    LAST,
    OUT_OF_MEMORY,
    PAUSE,
    RUNGS,
    Close,
    Demand,
    Denied,
    Done,
    Gave,
    Grant,
    Open,
    Opened,
    ProtocolError,
    Report,
    Return,
    Set,
    SetLimits,
)
from torch_elastic_mem.broker.queue import Queue
from torch_elastic_mem.broker.rules import check_permitted, in_force
from torch_elastic_mem.broker.session import Letter, Process, Session
from torch_elastic_mem.broker.shares import Shares
from torch_elastic_mem.broker.state import DeviceState
from torch_elastic_mem.errors import AdmissionError, InUseError, InvalidArgument, TemError
from torch_elastic_mem.units import format_bytes

# The driver takes its time to free a dead process's memory; where nothing shows it, this is enough.
DYING = 1.0

Plan = Callable[[int, dict[int, int], dict[int, int]], list[tuple[int, int]]]


class Books:
    """The books of one device.

    Attributes:
        rules: the operator's limits; the broker's own list, which it may change.
        stale: another device's group has changed them, and `settle` is due.
        grace: until when nothing is granted, for tenants of a broker that has died to come back.
    """

    def __init__(
        self,
        device: Device,
        reserve: tuple[int, int],
        post: list[Letter],
        journal: Journal,
        groups: Groups,
        rules: list[LimitsConfig],
        grace: float = 0.0,
    ) -> None:
        self.device = device
        self.rules = rules
        self.grace = grace
        self.stale = False
        self.accounts = Accounts(device.limit, *reserve)
        self.shares = Shares(self.accounts)
        self._post = post
        self._journal = journal
        self._groups = groups
        self._pressure = Pressure()
        self._asks = Asks(device.uuid, post, journal)
        self._queue = Queue(self.accounts, self._pressure)
        self._reserve: Need | None = None
        self._shrink: Need | None = None
        self._orders: list[tuple[Need, list[Holder], int]] = []
        self._dying: list[tuple[Holder, float]] = []

    # What processes say.

    def open(
        self, session: Session, request: int, message: Open, rights: Rights, trusted: bool, now: float
    ) -> None:
        """Opens an account, or takes back one that was lost.

        Args:
            session: its connection. request: the number to answer. message: what it wants.
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
                f"account '{title}' says that it holds {format_bytes(message.lease)}, which this broker has not "
                f"granted; open it with no lease"
            )
        else:
            holder = self.accounts.open_anyway(session, message.name, message.priority, wanted, forced)
            self.accounts.charge(holder, message.lease)
            self.device.recognise(message.lease)
        self._post.append((session, request, Opened(holder.id, holder.limits)))
        self._note("join", holder, now, bytes=holder.lease)
        self.settle(now)

    def close(self, session: Session, request: int, message: Close, now: float) -> None:
        """Closes an account.

        Raises:
            InUseError: it holds bytes.
        """
        holder = self._of(session, message.account)
        if holder.lease:
            raise InUseError(
                f"account '{holder.title}' still holds a lease of {format_bytes(holder.lease)}; return it first"
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
        """Grants, queues or denies a demand."""
        holder = self._of(session, message.account)
        if (message.rung > PAUSE and message.rung != FREE_ONLY) or message.want < message.bytes:
            raise ProtocolError(
                f"a demand of {message.bytes} to {message.want} bytes up to rung {message.rung}"
            )
        grace = now < self.grace
        free_only = message.rung == FREE_ONLY
        queued = Queued(
            demander=holder.title,
            top=-1 if free_only else message.rung,
            start=now,
            deadline=(self.grace if grace else now) if free_only else now + message.timeout / 1e6,
            holder=holder,
            request=request,
            demand=message,
        )
        if message.group:
            words = self._groups.join(queued, self, now)
            if words is not None:
                self._answer_no(queued, INVALID if not message.members else OUT_OF_MEMORY, words, now)
                return
        words = self._never(queued)
        if words is not None:
            self._deny(queued, words, now)
            return
        kept = 0 if grace else self.accounts.kept_free(holder, message.bytes)
        at_once = (
            not grace
            and not message.group
            and self.accounts.ledger.room(message.account) >= message.bytes + kept
        )
        if at_once and self.accounts.lease(holder, message.bytes):
            self._grant(queued, now)
            self._pursue(now)
            return
        self._queue.add(queued, now)
        self.settle(now)

    def withdraw(self, session: Session, request: int, now: float) -> None:
        """Denies a demand that its process does not want any more. One that has been answered is left alone."""
        for queued in list(self._queue):
            if queued.request == request and queued.holder.session is session:
                self._deny(queued, f"{self._wish(queued)} was withdrawn", now)
        self.settle(now)

    def give_back(self, session: Session, message: Return, now: float) -> None:
        """Takes lease back.

        Raises:
            ProtocolError: it is more than was granted.
        """
        holder = self._of(session, message.account)
        self._discharge(holder, message.bytes)
        self._asks.returned(holder, message.bytes, now)
        self.settle(now)

    def gave(self, session: Session, request: int, message: Gave, now: float) -> None:
        """Takes an answer to an ASK.

        Raises:
            ProtocolError: it is more than was granted.
        """
        holder = self._of(session, message.account)
        self._discharge(holder, message.bytes)
        last = bool(message.flags & LAST)
        self._asks.answer(request, holder, message.bytes, message.coming, last, now)
        self.settle(now)

    def report(self, session: Session, message: Report) -> None:
        """Notes what an account has in use."""
        holder = self._of(session, message.account)
        holder.rungs, holder.held, holder.idle = message.rungs, message.held, message.idle

    # What happens to processes.

    def leave(self, session: Session, now: float) -> None:
        """The connection has said BYE: nothing is held."""
        for holder in self._holders(session):
            self._discharge(holder, holder.lease)
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
        self.device.look(reading, self.accounts.holders.values())
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
        self._orders.append((need, holders, bytes))
        self.settle(now)

    def follow(self, limit: int, reserve: tuple[int, int], now: float) -> None:
        """Takes another capacity and other marks from the configuration."""
        self.device.limit = limit
        self.accounts.reserve_low, self.accounts.reserve_high = reserve
        self.accounts.set_capacity(self.device.capacity)
        self.settle(now)

    def settled(self, need: Need, now: float) -> bool:
        """No more will come of an operator's need."""
        for order in self._orders:
            if order[0] is need:
                done = need.gained >= order[2] or now >= need.deadline or need.rests > 0
                if done:
                    self._orders.remove(order)
                return done
        return True

    # Time.

    def wake(self, now: float) -> float:
        """When to call `settle` next; infinity for never."""
        times = [need.rest_until for need in self._needs() if need.rest_until > now]
        times += self._asks.times(now)
        for queued in self._queue:
            times.append(queued.deadline)
            if queued.holder.cool > now:
                times.append(queued.holder.cool)
        if self._queue and now < self.grace:
            times.append(self.grace)
        times += [until for _, until in self._dying]
        times += [need.deadline for need, _, _ in self._orders]
        return min(times, default=math.inf)

    def settle(self, now: float) -> None:
        """Does what is due, and all that can be done now."""
        self.stale = False
        if self._asks:
            self._asks.expire(now)
        if self._dying:
            self._bury_seen(now)
        if self._queue:
            self._refuse_debtors(now)
            self._serve(now)
            overdue = [queued for queued in self._queue if now >= queued.deadline]
            for queued in overdue:
                if queued.open:
                    self._deny(queued, self._late(queued, now), now)
            if overdue:
                self._serve(now)
        self._pursue(now)

    def state(self, now: float) -> DeviceState:
        """The device at this moment."""
        ledger, device = self.accounts.ledger, self.device
        holders = sorted(self.accounts.holders.values(), key=lambda each: (-each.limits.value, each.id))
        waiting = {holder.id: sum(queued.bytes for queued in self._queue.of(holder)) for holder in holders}
        return DeviceState(
            uuid=device.uuid,
            label=device.label,
            backend=device.backend,
            total=device.total,
            capacity=ledger.capacity,
            outside=device.outside,
            reserve_low=self.accounts.reserve_low,
            reserve_high=self.accounts.reserve_high,
            leased=ledger.leased,
            free=ledger.free,
            queued=self._queue.bytes,
            pressure=self._pressure.parts(now),
            accounts=[
                each.state(now, waiting[each.id], self._asks.unanswered(each), self._asks.owed(each))
                for each in holders
            ],
            shared=self.shares.states(),
        )

    # Members of groups.

    def deliver(self, queued: Queued, now: float) -> None:
        """Sends the grant of a demand whose bytes are charged."""
        self._queue.finish(queued, now)
        self._grant(queued, now)

    def undo(self, queued: Queued, kind: int, reason: str, now: float) -> None:
        """Takes a member of a group back."""
        self._queue.remove(queued, now)
        self._answer_no(queued, kind, reason, now)
        self.stale = True

    # Decisions.

    def _serve(self, now: float) -> None:
        if now < self.grace:
            return
        for queued in self._queue.serve():
            if queued.demand.group:
                self._groups.prepared(queued, now)
            else:
                self.deliver(queued, now)

    def _grant(self, queued: Queued, now: float) -> None:
        holder, demand = queued.holder, queued.demand
        bytes = demand.bytes
        if not demand.group and demand.want > bytes:
            bytes += self._extra(holder, demand.want - bytes)
        holder.taken += bytes
        self._journal.grants += 1
        self._post.append((holder.session, queued.request, Grant(holder.id, bytes)))
        self._note("grant", holder, now, start=queued.start, bytes=bytes)

    def _extra(self, holder: Holder, wish: int) -> int:
        """Leases what is free above the upper mark, beyond what a demand needs."""
        own = self.accounts.own_room(holder) - sum(queued.bytes for queued in self._queue.of(holder))
        room = self.accounts.ledger.room(holder.id) - self.accounts.above_low
        extra = min(wish, own, room)
        extra -= extra % holder.session.granularity
        return extra if extra > 0 and self.accounts.lease(holder, extra) else 0

    def _pursue(self, now: float) -> None:
        """Asks for what is missing and not on its way."""
        if now < self.grace:
            return
        ledger = self.accounts.ledger
        if self._orders:
            for need, holders, bytes in self._orders:
                self._ask(need, bytes - need.gained, self._order_plan(holders), holders, now)
        if ledger.overdrawn:
            self._shrink = self._shrink or shrink_need(now)
            missing = ledger.overdrawn - self._asks.expected(now)
            self._ask(self._shrink, missing, ledger.plan_shrink, self.accounts.holders.values(), now)
        else:
            self._shrink = None
        for queued, shortage in self._queue.shortages():
            missing = min(shortage - self._asks.expected(now), queued.bytes + self.accounts.above_low)
            self._ask(queued, missing, self._plan_for(queued.holder), self._victims(queued.holder, now), now)
        self._keep_reserve(now)

    def _keep_reserve(self, now: float) -> None:
        missing = self.accounts.above_low - self.accounts.ledger.free
        if missing <= 0 or not self.accounts.holders:
            self._reserve = None
            return
        holders = self.accounts.holders.values()
        top = max(holders, key=lambda each: (each.limits.value, -each.lease))
        lower = [each for each in holders if each.limits.value < top.limits.value]
        if not lower:
            return
        self._reserve = self._reserve or reserve_need(now)
        missing += self._queue.bytes - self._asks.expected(now)
        self._ask(self._reserve, min(missing, self.accounts.above_low), self._plan_for(top), lower, now)

    def _ask(self, need: Need, missing: int, plan: Plan, victims: Iterable[Holder], now: float) -> None:
        if missing <= 0 or need.top < 0 or now < need.rest_until or now >= need.deadline:
            return
        asked = self._asks.by_account(now)
        able = [
            (each, each.lease - asked.get(each.id, 0)) for each in victims if each.can_answer and each.lease
        ]
        while True:
            givable = {
                each.id: bytes
                for each, bytes in able
                if bytes > 0 and each.id not in need.exhausted and each.offers(need.rung)
            }
            planned = plan(missing, givable, asked) if givable else []
            for number, bytes in planned:
                holder = self.accounts.holders[number]
                same = isinstance(need, Queued) and need.holder.limits.value == holder.limits.value
                self._asks.send(need, holder, bytes, same, now)
            if planned or self._asks.hold_up(need, now):
                return
            if not need.climb():
                need.rest(now)
                return

    def _victims(self, demander: Holder, now: float) -> list[Holder]:
        value = demander.limits.value
        cooling = now < demander.cool
        return [
            each for each in self.accounts.holders.values() if not (cooling and each.limits.value == value)
        ]

    def _plan_for(self, demander: Holder) -> Plan:
        def plan(bytes: int, givable: dict[int, int], asked: dict[int, int]) -> list[tuple[int, int]]:
            return self.accounts.ledger.plan(demander.id, bytes, givable, asked)

        return plan

    def _order_plan(self, holders: list[Holder]) -> Plan:
        def plan(bytes: int, givable: dict[int, int], asked: dict[int, int]) -> list[tuple[int, int]]:
            asks = []
            for holder in holders:
                most = holder.lease - holder.limits.min - asked.get(holder.id, 0)
                take = min(bytes, most, givable.get(holder.id, 0))
                if take > 0:
                    asks.append((holder.id, take))
                    bytes -= take
            return asks

        return plan

    def _needs(self) -> Iterator[Need]:
        yield from self._queue.waiting
        yield from (need for need, _, _ in self._orders)
        yield from (need for need in (self._reserve, self._shrink) if need is not None)

    # Words.

    def _never(self, queued: Queued) -> str | None:
        """Why a demand can never be met, or may not be; None where it can."""
        holder, bytes = queued.holder, queued.bytes
        debts = self._debt_of(holder)
        if debts is not None:
            return f"{self._wish(queued)}, {debts}"
        own = self.accounts.own_room(holder) - sum(each.bytes for each in self._queue.of(holder))
        if bytes > own:
            return (
                f"{self._wish(queued)}; it holds {format_bytes(holder.lease)} of its max "
                f"{format_bytes(holder.limits.max)}; free some of its own, or raise its max"
            )
        most = self.accounts.ledger.leasable - self.accounts.kept_free(holder, bytes)
        if bytes + holder.lease > most:
            return (
                f"{self._wish(queued)} and holds {format_bytes(holder.lease)}; its class can have "
                f"{format_bytes(max(0, most))} of {self.device.label} ({self.accounts.ledger.holders()}); ask for less"
            )
        return None

    def _late(self, queued: Queued, now: float) -> str:
        ledger = self.accounts.ledger
        top = "only free memory counts" if queued.top < 0 else f"asked others up to '{RUNGS[queued.top]}'"
        return (
            f"{self._wish(queued)}; {format_bytes(ledger.free)} of {format_bytes(ledger.leasable)} on "
            f"{self.device.label} is free after {now - queued.start:.3g} s, {top} ({ledger.holders()}); wait longer, "
            f"ask for a dearer rung, or lower what another account may hold"
        )

    def _debt_of(self, holder: Holder) -> str | None:
        if not holder.session.process.debts:
            return None
        owed = sum(
            self._asks.owed(each)
            for each in self.accounts.holders.values()
            if each.session.process is holder.session.process
        )
        return (
            f"but its process was asked for {format_bytes(owed)} and has not answered in time; it is granted nothing "
            f"until it has"
        )

    @staticmethod
    def _wish(queued: Queued) -> str:
        return f"account '{queued.holder.title}' asks for {format_bytes(queued.bytes)}"

    # Bookkeeping.

    def _refuse_debtors(self, now: float) -> None:
        for queued in list(self._queue):
            if queued.open and (words := self._debt_of(queued.holder)) is not None:
                self._deny(queued, f"{self._wish(queued)}, {words}", now)

    def _deny(self, queued: Queued, reason: str, now: float, kind: int = OUT_OF_MEMORY) -> None:
        if queued.priority and queued.open:
            self._queue.remove(queued, now)
        self._answer_no(queued, kind, reason, now)
        if queued.demand.group:
            self._groups.fail(queued, kind, now)

    def _answer_no(self, queued: Queued, kind: int, reason: str, now: float) -> None:
        holder = queued.holder
        holder.denied += 1
        self._journal.denials += 1
        if holder.connected:
            self._post.append((holder.session, queued.request, Denied(kind, reason)))
        self._note("deny", holder, now, start=queued.start, bytes=queued.bytes)

    def _enforce(self, holder: Holder, now: float) -> bool:
        forced = in_force(
            holder.name, holder.title, self.device.names, holder.wanted_priority, holder.wanted, self.rules
        )
        if forced == (holder.priority, holder.limits):
            return False
        moved = forced[1].value != holder.limits.value
        self.accounts.set_limits(holder, *forced)
        if moved:
            self._queue.requeue(holder)
        for queued in self._queue.of(holder):
            if queued.ticket and queued.bytes > self.accounts.own_room(holder):
                self._deny(queued, self._never(queued) or self._wish(queued), now)
        self._note("limit", holder, now, bytes=holder.lease)
        return True

    def _drop(self, holder: Holder, now: float) -> None:
        """Nothing more is exchanged with an account's process."""
        self._asks.forget(holder)
        for queued in self._queue.of(holder):
            if queued.open:
                self._deny(queued, f"{self._wish(queued)}, but its account is closed", now, CLOSED)

    def _end(self, holder: Holder, kind: str, now: float) -> None:
        self._drop(holder, now)
        self.accounts.close(holder)
        for _, holders, _ in self._orders:
            if holder in holders:
                holders.remove(holder)
        self._note(kind, holder, now)

    def _bury_seen(self, now: float) -> None:
        for holder, until in list(self._dying):
            if now >= until or self.device.shows_gone(holder):
                self._dying.remove((holder, until))
                self._discharge(holder, holder.lease)
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

    def _note(
        self, kind: str, holder: Holder, now: float, *, start: float | None = None, bytes: int = 0
    ) -> None:
        began = now if start is None else start
        pid = holder.session.process.pid
        self._journal.add(kind, self.device.uuid, pid, holder.name, began, now, bytes=bytes)
