"""What has been asked of accounts and is not answered yet, and who is late with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch_elastic_mem.broker.holder import COOLING, Holder
from torch_elastic_mem.broker.journal import Journal
from torch_elastic_mem.broker.need import Need
from torch_elastic_mem.broker.protocol import PASS_ON, RUNGS, Ask
from torch_elastic_mem.broker.session import Letter


@dataclass(slots=True, eq=False)
class Asked:
    """One ASK.

    Attributes:
        given: bytes, until now. coming: what the victim said is behind fences.
        last: the last answer is there; only `coming` is waited for. late: it is not, and should be.
    """

    number: int
    holder: Holder
    need: Need
    rung: int
    bytes: int
    sent: float
    deadline: float
    same_class: bool
    given: int = 0
    coming: int = 0
    last: bool = False
    late: bool = False

    @property
    def patience(self) -> float:
        """Until when `coming` is counted on."""
        return min(self.deadline, self.need.patience)

    def expected(self, now: float) -> int:
        """Bytes that it will still bring."""
        if self.late:
            return 0
        left = max(0, self.bytes - self.given)
        if now >= self.patience:
            return 0 if self.last else max(0, left - self.coming)
        return min(left, self.coming) if self.last else left

    def holds_up(self, now: float) -> bool:
        """The need does not go on to the next rung because of it."""
        return not self.last and not self.late and not (self.coming and now >= self.patience)


class Asks:
    """The asks of one device."""

    def __init__(self, device: str, post: list[Letter], journal: Journal) -> None:
        self._device = device
        self._post = post
        self._journal = journal
        self._asked: dict[int, Asked] = {}
        self._last = 0

    def __bool__(self) -> bool:
        return bool(self._asked)

    def send(self, need: Need, holder: Holder, bytes: int, same_class: bool, now: float) -> None:
        """Asks an account, at the rung that the need has come to."""
        self._last += 1
        seconds = need.answer_time(now)
        self._asked[self._last] = Asked(
            self._last, holder, need, need.rung, bytes, now, now + seconds, same_class
        )
        flags = PASS_ON if need.takes_from(holder) else 0
        message = Ask(holder.id, need.rung, bytes, int(seconds * 1e6), need.demander, flags)
        self._post.append((holder.session, self._last, message))
        self._journal.asks += 1

    def expected(self, now: float, need: Need | None = None) -> int:
        """Bytes that all of them will still bring, or those of one need."""
        if not self._asked:
            return 0
        return sum(asked.expected(now) for asked in self._asked.values() if need in (None, asked.need))

    def by_account(self, now: float) -> dict[int, int]:
        """The same by account."""
        sums: dict[int, int] = {}
        for asked in self._asked.values():
            if bytes := asked.expected(now):
                sums[asked.holder.id] = sums.get(asked.holder.id, 0) + bytes
        return sums

    def hold_up(self, need: Need, now: float) -> bool:
        """An answer to the need is awaited."""
        return any(asked.need is need and asked.holds_up(now) for asked in self._asked.values())

    def answer(self, number: int, holder: Holder, bytes: int, coming: int, last: bool, now: float) -> None:
        """Takes an answer in. One to an ask that is no longer known is only a return."""
        asked = self._asked.get(number)
        if asked is None or asked.holder is not holder or asked.last:
            return
        asked.given += bytes
        asked.coming = coming
        self._count(asked, bytes, now)
        if not last:
            return
        asked.last = True
        if asked.late:
            asked.late = False
            holder.session.process.debts -= 1
        if asked.given + coming < asked.bytes and asked.rung >= asked.need.rung:
            asked.need.exhausted.add(holder.id)
        if asked.given:
            holder.note_yield(now, now - asked.sent)
        self._journal.add(
            "yield",
            self._device,
            holder,
            asked.sent,
            now,
            bytes=asked.given,
            asked=asked.bytes,
            rung=RUNGS[asked.rung],
            demander=asked.need.demander,
        )
        if not asked.expected(now):
            del self._asked[number]

    def returned(self, holder: Holder, bytes: int, now: float) -> None:
        """Sets a plain return against what the account said was coming."""
        for asked in list(self._asked.values()):
            if not bytes:
                return
            if asked.holder is holder and asked.last:
                part = min(bytes, asked.coming)
                asked.given += part
                asked.coming -= part
                bytes -= part
                self._count(asked, part, now)
                if not asked.expected(now):
                    del self._asked[asked.number]

    def _count(self, asked: Asked, bytes: int, now: float) -> None:
        asked.need.gained += bytes
        asked.holder.given += bytes
        if bytes and asked.same_class:
            asked.holder.cool = now + COOLING

    def expire(self, now: float) -> bool:
        """Makes debtors of those who are late. Returns whether there is a new one."""
        found = False
        for asked in list(self._asked.values()):
            if asked.last:
                if not asked.expected(now):
                    del self._asked[asked.number]
            elif not asked.late and now >= asked.deadline:
                asked.late = found = True
                asked.holder.session.process.debts += 1
                asked.need.exhausted.add(asked.holder.id)
        return found

    def forget(self, holder: Holder) -> None:
        """Nothing more will be answered by the account."""
        for asked in [asked for asked in self._asked.values() if asked.holder is holder]:
            if asked.late:
                holder.session.process.debts -= 1
            del self._asked[asked.number]

    @property
    def late(self) -> bool:
        """There is a debtor."""
        return any(asked.late for asked in self._asked.values())

    def owed(self, holder: Holder) -> int:
        """Bytes that the account should have answered for by now."""
        return sum(
            max(1, asked.bytes - asked.given)
            for asked in self._asked.values()
            if asked.late and asked.holder is holder
        )

    def unanswered(self, holder: Holder) -> bool:
        """An answer of the account is due."""
        return any(not asked.last and asked.holder is holder for asked in self._asked.values())

    def times(self, now: float) -> Iterator[float]:
        """When to look again."""
        for asked in self._asked.values():
            if not asked.late:
                if not asked.last:
                    yield asked.deadline
                if asked.coming and asked.patience > now:
                    yield asked.patience
