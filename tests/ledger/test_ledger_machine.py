"""The ledger against a model of it: sums, limits, admission and the order of the queue."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from torch_elastic_mem import _C
from torch_elastic_mem.errors import AdmissionError, ClosedError, InUseError, InvalidArgument

pytestmark = pytest.mark.core

SIZES = st.integers(0, 40) | st.sampled_from([2**63, 2**64 - 1])
VALUES = st.sampled_from([0, 100, 1000])


@dataclass
class Account:
    value: int
    min: int
    max: int | None
    held: int = 0


@dataclass
class Demand:
    account: int
    bytes: int
    value: int


class LedgerMachine(RuleBasedStateMachine):
    accounts = Bundle("accounts")
    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = _C.Ledger(100, 10)
        self.capacity, self.reserve = 100, 10
        self.model: dict[int, Account] = {}
        self.queue: dict[int, Demand] = {}
        self.overdrawn = False
        self.names = 0

    @property
    def leasable(self) -> int:
        return self.capacity - self.reserve

    @property
    def leased(self) -> int:
        return sum(account.held for account in self.model.values())

    def promised(self, beside: int | None = None) -> int:
        return sum(account.min for number, account in self.model.items() if number != beside)

    def room(self, number: int, value: int, before: float) -> int:
        """What is free less what is queued ahead: higher values, and equal ones that came before."""
        account = self.model[number]
        ahead = sum(
            demand.bytes
            for ticket, demand in self.queue.items()
            if demand.value > value or (demand.value == value and ticket < before)
        )
        own = float("inf") if account.max is None else max(0, account.max - account.held)
        return int(min(max(0, self.leasable - self.leased - ahead), own))

    @rule(target=accounts, value=VALUES, least=st.integers(0, 60), over=st.none() | st.integers(0, 60))
    def open(self, value: int, least: int, over: int | None) -> object:
        most = None if over is None else least + over
        self.names += 1
        limits = _C.Limits(value, min=least, max=most)
        if self.promised() + least > self.leasable:
            with pytest.raises(AdmissionError, match="lower this min or another account's"):
                self.ledger.open(f"account {self.names}", limits)
            return multiple()
        number = self.ledger.open(f"account {self.names}", limits)
        assert number not in self.model
        self.model[number] = Account(value, least, most)
        return number

    @rule(number=accounts)
    def close(self, number: int) -> None:
        if number not in self.model:
            with pytest.raises(ClosedError):
                self.ledger.close(number)
        elif self.model[number].held:
            with pytest.raises(InUseError, match="still holds"):
                self.ledger.close(number)
        elif all(demand.account != number for demand in self.queue.values()):
            self.ledger.close(number)
            del self.model[number]

    @rule(number=accounts, least=st.integers(0, 60), over=st.none() | st.integers(0, 60))
    def set_limits(self, number: int, least: int, over: int | None) -> None:
        if number not in self.model:
            return
        account = self.model[number]
        most = None if over is None else least + over
        limits = _C.Limits(account.value, min=least, max=most)
        if self.promised(number) + least > self.leasable:
            with pytest.raises(AdmissionError):
                self.ledger.set_limits(number, limits)
            return
        self.ledger.set_limits(number, limits)
        account.min, account.max = least, most

    @rule(capacity=st.integers(0, 120), reserve=st.integers(0, 120))
    def set_capacity(self, capacity: int, reserve: int) -> None:
        refusal: type[Exception] | None = None
        if capacity == 0 or reserve >= capacity:
            refusal = InvalidArgument
        elif self.promised() > capacity - reserve:
            refusal = AdmissionError
        if refusal is not None:
            with pytest.raises(refusal):
                self.ledger.set_capacity(capacity, reserve)
            return
        self.ledger.set_capacity(capacity, reserve)
        self.capacity, self.reserve = capacity, reserve
        self.overdrawn = self.leased > self.leasable

    @rule(number=accounts, size=SIZES)
    def grant(self, number: int, size: int) -> None:
        if number not in self.model:
            with pytest.raises(ClosedError):
                self.ledger.grant(number, size)
            return
        account = self.model[number]
        granted = size <= self.room(number, account.value, float("inf"))
        assert self.ledger.grant(number, size) is granted
        account.held += size if granted else 0

    @rule(number=accounts, size=SIZES)
    def give_back(self, number: int, size: int) -> None:
        if number not in self.model:
            return
        if size > self.model[number].held:
            with pytest.raises(InvalidArgument, match="but holds"):
                self.ledger.give_back(number, size)
            return
        self.ledger.give_back(number, size)
        self.model[number].held -= size

    @rule(number=accounts, size=st.integers(0, 40))
    def charge(self, number: int, size: int) -> None:
        if number not in self.model:
            with pytest.raises(ClosedError):
                self.ledger.charge(number, size)
            return
        self.ledger.charge(number, size)
        self.model[number].held += size
        self.overdrawn = self.leased > self.leasable

    @rule(target=tickets, number=accounts, size=SIZES)
    def enqueue(self, number: int, size: int) -> object:
        if number not in self.model:
            with pytest.raises(ClosedError):
                self.ledger.enqueue(number, size)
            return multiple()
        ticket = self.ledger.enqueue(number, size)
        assert ticket > max(self.queue, default=0), "tickets are in the order of coming"
        self.queue[ticket] = Demand(number, size, self.model[number].value)
        return ticket

    def missing(self, ticket: int) -> int:
        demand = self.queue[ticket]
        return max(0, demand.bytes - self.room(demand.account, demand.value, ticket))

    @rule(ticket=tickets)
    def grant_ticket(self, ticket: int) -> None:
        if ticket not in self.queue:
            with pytest.raises(InvalidArgument, match="no demand"):
                self.ledger.grant_ticket(ticket)
            return
        granted = self.missing(ticket) == 0
        assert self.ledger.grant_ticket(ticket) is granted
        if granted:
            demand = self.queue.pop(ticket)
            self.model[demand.account].held += demand.bytes

    @rule(ticket=consumes(tickets))
    def withdraw(self, ticket: int) -> None:
        self.ledger.withdraw(ticket)
        self.queue.pop(ticket, None)

    @invariant()
    def sums_are_right(self) -> None:
        assert self.ledger.leased == self.leased
        assert self.ledger.leasable == self.leasable
        assert self.ledger.free == max(0, self.leasable - self.leased)
        assert self.ledger.overdrawn == max(0, self.leased - self.leasable)
        for number, account in self.model.items():
            assert self.ledger.held(number) == account.held

    @invariant()
    def leases_exceed_what_is_leasable_only_after_a_charge_or_a_lowered_capacity(self) -> None:
        self.overdrawn = self.overdrawn and self.leased > self.leasable
        assert self.leased <= self.leasable or self.overdrawn

    @invariant()
    def every_min_fits(self) -> None:
        assert self.promised() <= self.leasable

    @invariant()
    def rooms_and_shortages_leave_out_what_is_queued_ahead(self) -> None:
        for number, account in self.model.items():
            assert self.ledger.room(number) == self.room(number, account.value, float("inf"))
        for ticket in self.queue:
            assert self.ledger.shortage(ticket) == self.missing(ticket)

    @invariant()
    def plans_take_only_what_may_be_taken(self) -> None:
        for number in self.model:
            asks = self.ledger.plan(number, 25)
            assert sum(size for _, size in asks) <= 25
            assert number not in [victim for victim, _ in asks]
            for victim, size in asks:
                assert 0 < size <= max(0, self.model[victim].held - self.model[victim].min)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedgerMachine.pytestmark = pytestmark
