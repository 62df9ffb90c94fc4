"""Who is asked to yield, how much and in which order: every pass of the table in csrc/ledger/ledger.hpp."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_elastic_mem import _C

pytestmark = pytest.mark.core


@dataclass
class Spec:
    value: int
    held: int = 0
    min: int = 0
    low: int = 0
    high: int | None = None
    weight: float = 1.0


class Book:
    """A ledger whose accounts are called by letters."""

    def __init__(self, capacity: int, **specs: Spec) -> None:
        self.ledger = _C.Ledger(capacity)
        self.ids: dict[str, int] = {}
        for name, spec in specs.items():
            limits = _C.Limits(spec.value, min=spec.min, low=spec.low, high=spec.high, weight=spec.weight)
            self.ids[name] = self.ledger.open(name, limits)
        for name, spec in specs.items():
            assert self.ledger.grant(self.ids[name], spec.held)

    def named(self, asks: list[tuple[int, int]]) -> list[tuple[str, int]]:
        names = {number: name for name, number in self.ids.items()}
        return [(names[victim], size) for victim, size in asks]

    def plan(self, name: str, size: int) -> list[tuple[str, int]]:
        return self.named(self.ledger.plan(self.ids[name], size))

    def shrink(self, size: int) -> list[tuple[str, int]]:
        return self.named(self.ledger.plan_shrink(size))


def test_nobody_else_means_nobody_is_asked() -> None:
    assert Book(100, a=Spec(0, held=50)).plan("a", 10) == []
    assert Book(100, a=Spec(0)).shrink(10) == []


def test_over_high_is_taken_first_and_from_any_class() -> None:
    book = Book(100, top=Spec(1000, held=50, high=40), low=Spec(0, held=50), me=Spec(100))
    assert book.plan("me", 5) == [("top", 5)]
    assert book.plan("me", 30) == [("top", 10), ("low", 20)]


def test_an_account_over_high_is_not_asked_below_high_by_a_lower_class() -> None:
    book = Book(100, top=Spec(1000, held=100, high=90), me=Spec(0))
    assert book.plan("me", 50) == [("top", 10)]


def test_lower_classes_yield_lowest_first() -> None:
    book = Book(100, b=Spec(100, held=40), a=Spec(0, held=60), me=Spec(1000))
    assert book.plan("me", 60) == [("a", 60)]
    assert book.plan("me", 70) == [("a", 60), ("b", 10)]
    assert book.plan("me", 500) == [("a", 60), ("b", 40)]


def test_higher_classes_are_never_asked() -> None:
    assert Book(100, top=Spec(1000, held=100), me=Spec(0)).plan("me", 10) == []


def test_within_a_class_the_one_most_above_its_share_yields_first() -> None:
    book = Book(100, a=Spec(0, held=30), b=Spec(0, held=70), me=Spec(100))
    assert book.plan("me", 80) == [("b", 70), ("a", 10)]
    heavy = Book(100, a=Spec(0, held=30), b=Spec(0, held=70, weight=9.0), me=Spec(100))
    assert heavy.plan("me", 80) == [("a", 30), ("b", 50)], "b's share is 90, so a is the one above its share"


def test_low_is_respected_until_nothing_else_is_left() -> None:
    book = Book(100, a=Spec(0, held=50, low=30), b=Spec(100, held=50, low=10), me=Spec(1000))
    assert book.plan("me", 40) == [("a", 20), ("b", 20)], (
        "b, of a higher class, goes before a's protected part"
    )
    assert book.plan("me", 70) == [("a", 30), ("b", 40)]


def test_min_is_never_crossed() -> None:
    book = Book(100, a=Spec(0, held=60, min=25), b=Spec(100, held=40, min=35, low=36), me=Spec(1000))
    assert book.plan("me", 1000) == [("a", 35), ("b", 5)]
    assert book.shrink(1000) == [("a", 35), ("b", 5)]


def test_peers_yield_what_is_above_their_share_to_one_below_its_own() -> None:
    book = Book(80, a=Spec(100, held=80), me=Spec(100))
    assert book.plan("me", 40) == [("a", 40)], "half each"
    assert book.plan("me", 60) == [("a", 40)], "not more than half"
    assert Book(80, a=Spec(100, held=40), me=Spec(100, held=40)).plan("me", 10) == []


def test_peers_share_by_weight() -> None:
    book = Book(80, a=Spec(100, held=80), me=Spec(100, weight=3.0))
    assert book.plan("me", 80) == [("a", 60)]
    light = Book(80, a=Spec(100, held=80, weight=3.0), me=Spec(100))
    assert light.plan("me", 80) == [("a", 20)]


def test_a_share_is_of_what_the_class_has_and_not_of_the_device() -> None:
    book = Book(120, top=Spec(1000, held=40), a=Spec(100, held=80), me=Spec(100))
    assert book.plan("me", 80) == [("a", 40)]


def test_a_peer_keeps_its_low_and_its_min() -> None:
    assert Book(80, a=Spec(100, held=80, low=70), me=Spec(100)).plan("me", 80) == [("a", 10)]
    assert Book(80, a=Spec(100, held=80, min=65), me=Spec(100)).plan("me", 80) == [("a", 15)]


def test_what_lower_classes_yield_makes_the_shares_larger() -> None:
    book = Book(100, low=Spec(0, held=20), a=Spec(100, held=80), me=Spec(100))
    assert book.plan("me", 50) == [("low", 20), ("a", 30)], "a keeps half of the hundred"
    assert book.plan("me", 100) == [("low", 20), ("a", 30)]


def test_above_high_an_account_is_entitled_to_nothing_but_what_others_hold_over_theirs() -> None:
    book = Book(100, low=Spec(0, held=50, high=45), me=Spec(1000, held=40, high=40), peer=Spec(1000, held=10))
    assert book.plan("me", 30) == [("low", 5)]


def test_up_to_high_an_account_makes_others_yield() -> None:
    book = Book(100, low=Spec(0, held=80), me=Spec(1000, held=20, high=30))
    assert book.plan("me", 50) == [("low", 10)]


def test_own_min_is_guaranteed_by_every_class() -> None:
    book = Book(100, top=Spec(1000, held=100), me=Spec(0, min=30))
    assert book.plan("me", 20) == [("top", 20)]
    assert book.plan("me", 50) == [("top", 30)], "the rest of the demand is not guaranteed"
    met = Book(100, top=Spec(1000, held=70), me=Spec(0, held=30, min=30))
    assert met.plan("me", 10) == []


def test_the_guarantee_leaves_others_their_own_min() -> None:
    book = Book(100, top=Spec(1000, held=100, min=80), me=Spec(0, min=20))
    assert book.plan("me", 20) == [("top", 20)]


def test_a_victim_is_asked_once_for_all_passes() -> None:
    book = Book(100, a=Spec(0, held=100, min=10, low=40, high=90), me=Spec(1000))
    assert book.plan("me", 1000) == [("a", 90)]


def test_shrinking_asks_over_high_then_the_lowest_then_the_protected() -> None:
    book = Book(
        100,
        a=Spec(0, held=40, low=30),
        b=Spec(100, held=30, min=5, low=20),
        top=Spec(1000, held=30, high=25),
    )
    assert book.shrink(5) == [("top", 5)]
    assert book.shrink(25) == [("top", 5), ("a", 10), ("b", 10)]
    assert book.shrink(40) == [("top", 20), ("a", 10), ("b", 10)], "top's unprotected part before any's low"
    assert book.shrink(1000) == [("top", 30), ("a", 40), ("b", 25)]


SPECS = st.builds(
    lambda value, held, least, low, high, weight: Spec(
        value,
        held,
        least,
        0 if low is None else least + low,
        None if high is None else least + (low or 0) + high,
        weight,
    ),
    value=st.sampled_from([0, 100, 100, 1000]),
    held=st.integers(0, 100),
    least=st.integers(0, 40),
    low=st.none() | st.integers(0, 40),
    high=st.none() | st.integers(0, 40),
    weight=st.sampled_from([0.25, 1.0, 3.0]),
)
LEDGERS = st.lists(SPECS, min_size=1, max_size=6)


def book_of(specs: list[Spec], free: int) -> Book:
    # The ledger admits by the sum of `min`, so room for those that are not held yet must be there.
    needed = sum(max(spec.held, spec.min) for spec in specs)
    return Book(max(1, needed + free), **{f"a{i}": spec for i, spec in enumerate(specs)})


@given(LEDGERS, st.integers(0, 50), st.integers(0, 300))
@settings(deadline=None)
def test_a_plan_asks_for_no_more_than_is_wanted_and_nobody_twice(
    specs: list[Spec], free: int, size: int
) -> None:
    book = book_of(specs, free)
    for asks in (book.plan("a0", size), book.shrink(size)):
        assert sum(asked for _, asked in asks) <= size
        assert len({victim for victim, _ in asks}) == len(asks)
        assert all(asked > 0 for _, asked in asks)
    assert "a0" not in [victim for victim, _ in book.plan("a0", size)]


@given(LEDGERS, st.integers(0, 50), st.integers(0, 300))
@settings(deadline=None)
def test_nobody_is_asked_below_min_and_no_higher_class_below_high_but_for_a_guarantee(
    specs: list[Spec], free: int, size: int
) -> None:
    asks = dict(book_of(specs, free).plan("a0", size))
    me = specs[0]
    guaranteed = max(0, me.min - me.held)
    from_above = 0
    for i, victim in enumerate(specs[1:], 1):
        asked = asks.get(f"a{i}", 0)
        assert asked <= max(0, victim.held - victim.min)
        if victim.value > me.value:
            over_high = 0 if victim.high is None else max(0, victim.held - victim.high)
            from_above += max(0, asked - over_high)
    assert from_above <= guaranteed


@given(LEDGERS, st.integers(0, 50), st.integers(1, 300))
@settings(deadline=None)
def test_what_lower_classes_can_yield_is_found_in_full(specs: list[Spec], free: int, size: int) -> None:
    me = specs[0]
    me.high = None
    asks = book_of(specs, free).plan("a0", size)
    reachable = sum(max(0, victim.held - victim.min) for victim in specs[1:] if victim.value < me.value)
    assert sum(asked for _, asked in asks) >= min(size, reachable)


@given(LEDGERS, st.integers(0, 50), st.integers(1, 300))
@settings(deadline=None)
def test_a_shrink_finds_all_that_is_above_min(specs: list[Spec], free: int, size: int) -> None:
    asks = book_of(specs, free).shrink(size)
    reachable = sum(max(0, victim.held - victim.min) for victim in specs)
    assert sum(asked for _, asked in asks) == min(size, reachable)


@given(LEDGERS, st.integers(1, 300))
@settings(deadline=None)
def test_a_lower_class_gives_all_it_must_before_a_higher_one_is_asked(specs: list[Spec], size: int) -> None:
    for spec in specs:
        spec.high = None
    me = specs[0]
    asks = dict(book_of(specs, 0).plan("a0", size))
    lower = [(f"a{i}", spec) for i, spec in enumerate(specs) if i and spec.value < me.value]
    for name, spec in lower:
        unprotected = max(0, spec.held - max(spec.min, spec.low))
        higher = [other for other, its in lower if its.value > spec.value]
        if any(asks.get(other, 0) for other in higher):
            assert asks.get(name, 0) >= unprotected


def test_who_can_give_little_is_asked_for_that_and_others_for_the_rest() -> None:
    book = Book(100, a=Spec(0, held=40), b=Spec(0, held=30), me=Spec(100))
    a, b = book.ids["a"], book.ids["b"]
    assert book.ledger.plan(book.ids["me"], 20, {a: 5, b: 30}) == [(a, 5), (b, 15)]
    assert book.ledger.plan(book.ids["me"], 20, {b: 3}) == [(b, 3)]
    assert book.ledger.plan_shrink(20, {b: 3}) == [(b, 3)]


def test_limits_protect_what_is_left_after_what_was_asked_already() -> None:
    book = Book(100, victim=Spec(0, held=40, min=10), me=Spec(100))
    victim, me = book.ids["victim"], book.ids["me"]
    assert book.ledger.plan(me, 40, None, {victim: 25}) == [(victim, 5)]
    assert book.ledger.plan_shrink(40, None, {victim: 30}) == []


def test_a_charge_may_overdraw_and_holds_up_others_until_it_is_back() -> None:
    ledger = _C.Ledger(100, 10)
    back, other = ledger.open("back", _C.Limits(0, max=50)), ledger.open("other", _C.Limits(100))
    ledger.charge(back, 120)
    assert (ledger.held(back), ledger.free, ledger.overdrawn) == (120, 0, 30)
    assert not ledger.grant(other, 1)
    assert ledger.plan_shrink(30) == [(back, 30)]


def test_a_peers_work_is_paused_for_nobody_who_has_half_of_its_share() -> None:
    book = Book(120, first=Spec(100, held=60), second=Spec(100, held=30), third=Spec(100, held=15))
    may = {name: book.ledger.may_pause(book.ids[name], book.ids["first"]) for name in ("second", "third")}
    assert may == {"second": False, "third": True}


def test_a_peers_work_is_paused_for_one_below_its_min_and_anothers_class_at_any_time() -> None:
    book = Book(100, peer=Spec(100, held=40), me=Spec(100, held=40, min=50), low=Spec(0, held=20))
    assert book.ledger.may_pause(book.ids["me"], book.ids["peer"])
    assert not book.ledger.may_pause(book.ids["peer"], book.ids["me"])
    assert book.ledger.may_pause(book.ids["peer"], book.ids["low"])
    assert book.ledger.may_pause(book.ids["low"], book.ids["peer"]), "limits decide what a lower class gets"
