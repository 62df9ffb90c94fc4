from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import torch_elastic_mem as tem


def test_the_built_in_classes_are_in_order() -> None:
    names = ("idle", "training", "serving", "critical")
    assert [tem.priority(name).value for name in names] == [0, 100, 1000, 10000]
    assert [tem.priority(name).name for name in names] == list(names)


def test_a_class_starts_without_limits() -> None:
    known = tem.priority("training")
    assert (known.min, known.low, known.high, known.max, known.weight) == (0, 0, None, None, 1.0)


def test_a_class_is_a_value() -> None:
    assert tem.PriorityClass("batch", 50, min=1) == tem.PriorityClass("batch", 50, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tem.priority("idle").value = 5  # type: ignore[misc]


def test_limits_can_be_replaced_and_are_checked_again() -> None:
    known = dataclasses.replace(tem.priority("training"), max=1 << 30)
    assert (known.name, known.max) == ("training", 1 << 30)
    with pytest.raises(tem.InvalidArgument):
        dataclasses.replace(known, min=2 << 30)


@pytest.mark.parametrize("unknown", ["", "Training", "urgent", None, 100])
def test_an_unknown_class_is_refused_with_the_known_ones(unknown: Any) -> None:
    with pytest.raises(tem.InvalidArgument, match="'idle', 'training', 'serving', 'critical'"):
        tem.priority(unknown)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": ""}, "name"),
        ({"name": 3}, "name"),
        ({"value": 1.5}, "value=1.5"),
        ({"value": True}, "value=True"),
        ({"value": 10**9 + 1}, "value=1000000001"),
        ({"value": -(2**31) - 1}, "value=-2147483649"),
        ({"min": -1}, "min=-1"),
        ({"min": None}, "min=None"),
        ({"low": "1GiB"}, "low='1GiB'"),
        ({"high": -5}, "high=-5"),
        ({"max": 2**63}, "max=9223372036854775808"),
        ({"max": True}, "max=True"),
        ({"min": 2 << 30, "max": 1 << 30}, "min=2 GiB is above max=1 GiB"),
        ({"weight": 0}, "weight=0"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("inf")}, "weight=inf"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"weight": "1"}, "weight='1'"),
    ],
)
def test_a_field_that_can_never_be_right_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(tem.InvalidArgument) as raised:
        tem.PriorityClass(**{"name": "batch", "value": 50, **fields})
    assert named in str(raised.value)
