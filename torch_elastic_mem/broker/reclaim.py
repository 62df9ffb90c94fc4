"""Who is asked to give, how dearly, and what for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch_elastic_mem.broker.accounts import Accounts
from torch_elastic_mem.broker.asks import Asks
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.need import Need, Queued, reserve_need, shrink_need
from torch_elastic_mem.broker.protocol import EVICT, PAUSE
from torch_elastic_mem.broker.queue import Queue

# Of bytes missing, what accounts can give, and what they were asked for already: whom to ask for how much.
Plan = Callable[[int, dict[int, int], dict[int, int]], list[tuple[int, int]]]


class Reclaim:
    """What is missing on one device, and the asks that go out for it.

    What is on its way back is not asked for again, whoever it was for: what is freed goes to the queue's
    first.
    """

    def __init__(self, accounts: Accounts, queue: Queue, asks: Asks) -> None:
        self._accounts = accounts
        self._queue = queue
        self._asks = asks
        self._reserve: Need | None = None
        self._shrink: Need | None = None
        self._orders: list[tuple[Need, list[Holder], int]] = []

    @property
    def busy(self) -> bool:
        """Something is missing beside what demands wait for."""
        return bool(self._reserve or self._shrink or self._orders)

    def order(self, need: Need, holders: list[Holder], bytes: int) -> None:
        """Takes an operator's order: to ask these until the need has gained so much."""
        self._orders.append((need, holders, bytes))

    def settled(self, need: Need, now: float) -> bool:
        """No more will come of an order. It is forgotten then."""
        for order in self._orders:
            if order[0] is need:
                done = need.gained >= order[2] or now >= need.deadline or need.rests > 0
                if done:
                    self._orders.remove(order)
                return done
        return True

    def forget(self, holder: Holder) -> None:
        """An account is closed."""
        for _, holders, _ in self._orders:
            if holder in holders:
                holders.remove(holder)

    def times(self, now: float) -> Iterator[float]:
        """When to look again."""
        yield from (need.deadline for need, _, _ in self._orders)
        yield from (need.rest_until for need in self._needs() if need.rest_until > now)

    def pursue(self, now: float) -> None:
        """Asks for what is missing and not on its way."""
        ledger = self._accounts.ledger
        quiet = not (self._orders or self._queue or self._asks or ledger.overdrawn)
        if quiet and ledger.free >= self._accounts.above_low:
            self._shrink = self._reserve = None
            return
        for need, holders, bytes in self._orders:
            missing = bytes - need.gained - self._asks.expected(now, need)
            self._ask(need, missing, self._take_of(holders), holders, now)
        coming = self._asks.expected(now)
        if ledger.overdrawn:
            self._shrink = self._shrink or shrink_need(now)
            everybody = self._accounts.holders.values()
            coming += self._ask(self._shrink, ledger.overdrawn - coming, ledger.plan_shrink, everybody, now)
        else:
            self._shrink = None
        for queued, shortage in self._queue.shortages():
            missing = min(shortage - coming, queued.bytes + self._accounts.above_low)
            if missing > 0 and now >= queued.rest_until:
                victims = self._victims(queued.holder, now)
                coming += self._ask(queued, missing, self._plan_for(queued.holder), victims, now)
        if ledger.free < self._accounts.above_low:
            self._keep_reserve(coming, now)
        else:
            self._reserve = None

    def _keep_reserve(self, coming: int, now: float) -> None:
        """Asks the classes below the highest, as an account of that would."""
        holders = self._accounts.holders.values()
        top = max(holders, key=lambda each: (each.limits.value, -each.lease), default=None)
        lower = [each for each in holders if top is not None and each.limits.value < top.limits.value]
        if top is None or not lower:
            self._reserve = None
            return
        self._reserve = self._reserve or reserve_need(now)
        above_low = self._accounts.above_low
        missing = above_low - self._accounts.ledger.free + self._queue.bytes - coming
        self._ask(self._reserve, min(missing, above_low), self._plan_for(top), lower, now)

    def _ask(self, need: Need, missing: int, plan: Plan, victims: Iterable[Holder], now: float) -> int:
        """Sends one plan at the need's rung, or goes up to where there is one. Returns how much was asked."""
        if missing <= 0 or need.top < 0 or now < need.rest_until or now >= need.deadline:
            return 0
        asked = self._asks.by_account(now)
        able = [each for each in victims if each.can_answer and each.spare > asked.get(each.id, 0)]
        while True:
            givable = {
                each.id: each.spare - asked.get(each.id, 0)
                for each in able
                if each.id not in need.exhausted and each.offers(need.rung) and self._may_ask(need, each)
            }
            planned = plan(missing, givable, asked) if givable else []
            planned = self._with_unused(need, missing, givable, planned)
            for number, bytes in planned:
                holder = self._accounts.holders[number]
                same = isinstance(need, Queued) and need.holder.limits.value == holder.limits.value
                self._asks.send(need, holder, bytes, same, now)
            if planned or self._asks.hold_up(need, now):
                return sum(bytes for _, bytes in planned)
            if not need.climb():
                need.rest(now)
                return 0

    def _may_ask(self, need: Need, victim: Holder) -> bool:
        if need.rung < PAUSE or not isinstance(need, Queued):
            return True
        return self._accounts.ledger.may_pause(need.holder.id, victim.id)

    def _with_unused(
        self, need: Need, missing: int, givable: dict[int, int], planned: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """A plan, and what its peers only keep warm.

        A share protects what is in use. What comes at the two cheapest rungs is not: it goes to whoever of
        the class needs it, be they above their share. Who may only ask for what is cheap has something of its
        own to live from.
        """
        if not isinstance(need, Queued) or need.rung > EVICT or need.top <= EVICT:
            return planned
        me = need.holder
        left = min(missing, max(0, me.limits.high - me.lease)) - sum(bytes for _, bytes in planned)
        asks = dict(planned)
        peers = [each for each in self._accounts.holders.values() if each.limits.value == me.limits.value]
        for peer in sorted(peers, key=lambda each: -each.lease):
            room = givable.get(peer.id, 0) - asks.get(peer.id, 0) - max(0, peer.limits.low - peer.limits.min)
            if peer is not me and left > 0 and room > 0:
                asks[peer.id] = asks.get(peer.id, 0) + min(left, room)
                left -= min(left, room)
        return list(asks.items())

    def _victims(self, demander: Holder, now: float) -> list[Holder]:
        value = demander.limits.value
        cooling = now < demander.cool
        return [
            each for each in self._accounts.holders.values() if not (cooling and each.limits.value == value)
        ]

    def _plan_for(self, demander: Holder) -> Plan:
        def plan(bytes: int, givable: dict[int, int], asked: dict[int, int]) -> list[tuple[int, int]]:
            return self._accounts.ledger.plan(demander.id, bytes, givable, asked)

        return plan

    @staticmethod
    def _take_of(holders: list[Holder]) -> Plan:
        def plan(bytes: int, givable: dict[int, int], asked: dict[int, int]) -> list[tuple[int, int]]:
            asks = []
            for holder in holders:
                take = min(bytes, givable.get(holder.id, 0))
                if take > 0:
                    asks.append((holder.id, take))
                    bytes -= take
            return asks

        return plan

    def _needs(self) -> Iterator[Need]:
        yield from self._queue.waiting
        yield from (need for need, _, _ in self._orders)
        yield from (need for need in (self._reserve, self._shrink) if need is not None)
