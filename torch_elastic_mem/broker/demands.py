"""Demands on one device: granted, queued, denied, by themselves or as a group."""

from __future__ import annotations

from torch_elastic_mem.broker import words
from torch_elastic_mem.broker.accounts import Accounts
from torch_elastic_mem.broker.asks import Asks
from torch_elastic_mem.broker.basket import Basket
from torch_elastic_mem.broker.device import Device
from torch_elastic_mem.broker.grace import Grace
from torch_elastic_mem.broker.groups import Groups
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.journal import Journal
from torch_elastic_mem.broker.need import Queued
from torch_elastic_mem.broker.protocol import (
    CLOSED,
    FREE_ONLY,
    INVALID,
    OUT_OF_MEMORY,
    PAUSE,
    UNLIMITED,
    Demand,
    Denied,
    Grant,
    ProtocolError,
)
from torch_elastic_mem.broker.queue import Queue
from torch_elastic_mem.broker.session import Letter, Session

# A thread waits for one; more is a program that has lost its way, and every one is looked at in each turn.
MOST_WAITING = 128


class Demands:
    """What accounts ask for, until it is answered.

    Attributes:
        stale: something has changed, in a group of several devices too, and the books are to be settled.
    """

    def __init__(
        self,
        device: Device,
        accounts: Accounts,
        queue: Queue,
        asks: Asks,
        basket: Basket,
        groups: Groups,
        post: list[Letter],
        journal: Journal,
        grace: Grace,
    ) -> None:
        self.stale = False
        self._device = device
        self._accounts = accounts
        self._queue = queue
        self._asks = asks
        self._basket = basket
        self._groups = groups
        self._post = post
        self._journal = journal
        self._grace = grace

    def demand(self, holder: Holder, request: int, message: Demand, now: float) -> None:
        """Grants, queues or denies a demand.

        Raises:
            ProtocolError: it cannot be one.
        """
        free_only = message.rung == FREE_ONLY
        if (message.rung > PAUSE and not free_only) or message.want < message.bytes:
            raise ProtocolError(
                f"a demand of {message.bytes} to {message.want} bytes up to rung {message.rung}"
            )
        grace = now < self._grace.until
        refusal = self._refusal(holder, message.bytes)
        if refusal is None and not grace and not message.group:
            kept = self._accounts.kept_free(holder, message.bytes)
            room = self._accounts.ledger.room(holder.id)
            if room >= message.bytes + kept and self._accounts.lease(holder, message.bytes):
                self._grant(holder, request, message, now, now)
                return
        queued = Queued(
            demander=holder.title,
            top=-1 if free_only else message.rung,
            start=now,
            deadline=(self._grace.until if grace else now) if free_only else now + message.timeout / 1e6,
            holder=holder,
            request=request,
            demand=message,
        )
        if message.group:
            no_member = self._groups.join(queued, self, now)
            if no_member is not None:
                self._answer_no(queued, OUT_OF_MEMORY if message.members else INVALID, no_member, now)
                return
        if refusal is None and len(self._queue.of(holder)) >= MOST_WAITING:
            refusal = f"{words.wish(holder, message.bytes)}, but {MOST_WAITING} of its demands wait already"
        if refusal is not None:
            self._deny(queued, refusal, now)
            return
        self._queue.add(queued, now)
        self.stale = True

    def withdraw(self, session: Session, request: int, now: float) -> None:
        """Denies a demand that its process does not want any more, where it has not been answered yet."""
        for queued in list(self._queue):
            if queued.request == request and queued.holder.session is session:
                self._deny(queued, f"{words.wish(queued.holder, queued.bytes)}, and has withdrawn it", now)

    def settle(self, now: float) -> None:
        """Answers all that can be answered now."""
        for queued in list(self._queue):
            if queued.open and queued.holder.session.process.debts:
                self._deny(queued, self._refusal(queued.holder, queued.bytes) or "", now)
        self._serve(now)
        overdue = [queued for queued in self._queue if now >= queued.deadline]
        for queued in overdue:
            if queued.open:
                self._deny(queued, words.too_late(queued, self._device.label, self._accounts, now), now)
        if overdue:
            self._serve(now)

    def drop(self, holder: Holder, now: float) -> None:
        """Denies what an account has asked for: nothing more is exchanged with it."""
        for queued in self._queue.of(holder):
            if queued.open:
                wish = words.wish(holder, queued.bytes)
                self._deny(queued, f"{wish}, but its account is closed", now, CLOSED)

    def limit(self, holder: Holder, moved: bool, now: float) -> None:
        """An account has other limits: it queues in its class now, and what goes beyond `max` is denied."""
        if moved:
            self._queue.requeue(holder)
        for queued in self._queue.of(holder):
            if queued.ticket and self._own_room(holder) < 0:
                self._deny(queued, words.above_max(holder, queued.bytes), now)

    def deliver(self, queued: Queued, now: float) -> None:
        """Sends the grant of a demand whose bytes are charged."""
        self._queue.finish(queued, now)
        self._grant(queued.holder, queued.request, queued.demand, queued.start, now)

    def undo(self, queued: Queued, kind: int, reason: str, now: float) -> None:
        """Takes a member of a group back."""
        self._queue.remove(queued, now)
        self._answer_no(queued, kind, reason, now)
        self.stale = True

    def note(self, holder: Holder, bytes: int, start: float, now: float) -> None:
        """Writes a grant down."""
        holder.taken += bytes
        self._journal.grants += 1
        self._journal.add("grant", self._device.uuid, holder, start, now, bytes=bytes)

    def _serve(self, now: float) -> None:
        if now < self._grace.until:
            return
        for queued in self._queue.serve():
            if queued.demand.group:
                self._groups.prepared(queued, now)
            else:
                self.deliver(queued, now)

    def _grant(self, holder: Holder, request: int, demand: Demand, start: float, now: float) -> None:
        bytes = demand.bytes
        if demand.want > bytes and not demand.group:
            bytes += self._extra(holder, demand.want - bytes)
        passed = self._basket.take(holder, bytes)
        self._basket.shrink(self._accounts.ledger.free)
        self._post += [(holder.session, request, each) for each in passed]
        self._post.append((holder.session, request, Grant(holder.id, bytes)))
        self.note(holder, bytes, start, now)

    def _extra(self, holder: Holder, wish: int) -> int:
        """Leases what is free above the upper mark, beyond what a demand needs."""
        own = self._own_room(holder)
        room = self._accounts.ledger.room(holder.id) - self._accounts.above_low
        extra = min(wish, own, room)
        extra -= extra % holder.session.granularity
        return extra if extra > 0 and self._accounts.lease(holder, extra) else 0

    def _refusal(self, holder: Holder, bytes: int) -> str | None:
        """Why a demand can never be met, or may not be; None where it can."""
        process = holder.session.process
        if process.debts:
            accounts = self._accounts.holders.values()
            owed = sum(self._asks.owed(each) for each in accounts if each.session.process is process)
            return words.in_debt(holder, bytes, owed)
        if holder.limits.max != UNLIMITED and bytes > self._own_room(holder):
            return words.above_max(holder, bytes)
        most = self._accounts.ledger.leasable - self._accounts.kept_free(holder, bytes)
        if bytes + holder.lease > most:
            return words.above_capacity(holder, bytes, most, self._device.label, self._accounts)
        return None

    def _own_room(self, holder: Holder) -> int:
        """What is left below its `max`, its queued demands met."""
        return self._accounts.own_room(holder) - sum(
            each.bytes for each in self._queue.of(holder) if each.ticket
        )

    def _deny(self, queued: Queued, reason: str, now: float, kind: int = OUT_OF_MEMORY) -> None:
        if queued.open:
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
        self._journal.add("deny", self._device.uuid, holder, queued.start, now, bytes=queued.bytes)
