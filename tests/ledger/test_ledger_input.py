"""What a ledger refuses, in words, and that a refusal changes nothing."""

from __future__ import annotations

import pytest

from torch_elastic_mem import _C
from torch_elastic_mem.errors import AdmissionError, ClosedError, InUseError, InvalidArgument

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"min": 4, "max": 2}, "min 4 B is above max 2 B"),
        ({"min": 4, "low": 2}, "low 2 B is below min 4 B"),
        ({"low": 4, "max": 2}, "low 4 B is above max 2 B"),
        ({"high": 4, "max": 2}, "high 4 B is above max 2 B"),
        ({"min": 4, "high": 2}, "high 2 B is below min 4 B"),
        ({"low": 4, "high": 2}, "high 2 B is below low 4 B"),
        ({"weight": 0.0}, "weight must be a positive number"),
        ({"weight": -1.0}, "weight must be a positive number"),
        ({"weight": float("nan")}, "weight must be a positive number"),
        ({"weight": float("inf")}, "weight must be a positive number"),
    ],
)
def test_limits_that_contradict_each_other(limits: dict[str, float], words: str) -> None:
    ledger = _C.Ledger(100)
    bad = _C.Limits(0, **limits)  # type: ignore[arg-type]
    account = ledger.open("a", _C.Limits(0, min=1))
    for use in (lambda: ledger.open("b", bad), lambda: ledger.set_limits(account, bad)):
        with pytest.raises(InvalidArgument, match=words):
            use()
    with pytest.raises(AdmissionError):
        ledger.open("b", _C.Limits(0, min=100))
    ledger.open("b", _C.Limits(0, min=99))


def test_a_capacity_or_reserve_that_leaves_nothing() -> None:
    for capacity, reserve, words in ((0, 0, "zero bytes"), (10, 10, "leaves nothing"), (10, 11, "leaves")):
        with pytest.raises(InvalidArgument, match=words):
            _C.Ledger(capacity, reserve)
        ledger = _C.Ledger(100, 5)
        with pytest.raises(InvalidArgument, match=words):
            ledger.set_capacity(capacity, reserve)
        assert (ledger.capacity, ledger.leasable) == (100, 95)


def test_a_name_is_used_once_at_a_time() -> None:
    ledger = _C.Ledger(100)
    first = ledger.open("a", _C.Limits(0))
    with pytest.raises(InvalidArgument, match="'a' exists already"):
        ledger.open("a", _C.Limits(5))
    ledger.close(first)
    again = ledger.open("a", _C.Limits(5))
    assert again != first, "numbers are not used again"
    with pytest.raises(ClosedError, match="has been closed"):
        ledger.room(first)


def test_an_account_that_holds_bytes_stays_open() -> None:
    ledger = _C.Ledger(100)
    account = ledger.open("a", _C.Limits(0))
    ledger.grant(account, 7)
    with pytest.raises(InUseError, match="'a' still holds 7 B"):
        ledger.close(account)
    with pytest.raises(InvalidArgument, match="gives back 8 B but holds 7 B"):
        ledger.give_back(account, 8)
    assert ledger.held(account) == 7


def test_demands_larger_than_all_numbers_still_go_first() -> None:
    ledger = _C.Ledger(100)
    account = ledger.open("a", _C.Limits(0))
    first = ledger.enqueue(account, 2**64 - 1)
    second = ledger.enqueue(account, 2**64 - 1)
    assert ledger.room(account) == 0 and not ledger.grant(account, 1)
    ledger.withdraw(first)
    ledger.withdraw(second)
    assert ledger.room(account) == 100


def test_mins_that_overflow_together_are_refused() -> None:
    ledger = _C.Ledger(2**64 - 1)
    ledger.open("a", _C.Limits(0, min=2**64 - 10))
    with pytest.raises(AdmissionError):
        ledger.open("b", _C.Limits(0, min=2**64 - 10))
