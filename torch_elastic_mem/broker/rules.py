"""Which limits are in force: what a process asks for, what its user may, and what the operator has set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from torch_elastic_mem import _C
from torch_elastic_mem.broker.config import Grant, LimitsConfig
from torch_elastic_mem.broker.protocol import (
    ADMISSION,
    CLOSED,
    IN_USE,
    INVALID,
    NOT_PERMITTED,
    UNLIMITED,
    Limits,
)
from torch_elastic_mem.errors import AdmissionError, ClosedError, InUseError, InvalidArgument, TemError
from torch_elastic_mem.priority import HIGHEST_VALUE, LOWEST_VALUE
from torch_elastic_mem.units import format_bytes, parse_bytes

_KINDS: tuple[tuple[type[TemError], int], ...] = (
    (AdmissionError, ADMISSION),
    (ClosedError, CLOSED),
    (InUseError, IN_USE),
)


class NotPermitted(TemError, PermissionError):
    """The user of the process may not ask for this; the operator can allow it."""


def kind_of(error: TemError) -> int:
    """An error's number on the wire."""
    if isinstance(error, NotPermitted):
        return NOT_PERMITTED
    return next((number for kind, number in _KINDS if isinstance(error, kind)), INVALID)


def limits_rule(name: str, device: str | None, limits: Mapping[str, object]) -> LimitsConfig:
    """What an operator wants of accounts, as a rule; None for `high` or `max` is no limit.

    Raises:
        InvalidArgument: there is no such limit, or it is no size.
    """
    if not limits:
        raise InvalidArgument("no limit is given; give some of min, low, high, max, weight")
    if unknown := limits.keys() - {"min", "low", "high", "max", "weight"}:
        raise InvalidArgument(f"no limit '{min(unknown)}'; there are min, low, high, max, weight")
    sizes = {
        field: UNLIMITED if size is None and field in ("high", "max") else size
        for field, size in limits.items()
    }
    for field, size in sizes.items():
        if field != "weight" and size != UNLIMITED:
            parse_bytes(size)  # type: ignore[arg-type]  # it refuses what is no size
    try:
        return msgspec.convert({"name": name, "device": device, **sizes}, LimitsConfig)
    except msgspec.ValidationError as error:
        raise InvalidArgument(str(error)) from None


def with_rule(rules: Iterable[LimitsConfig], rule: LimitsConfig) -> list[LimitsConfig]:
    """Rules and another. What it does not say stays as an earlier one of the same accounts has it."""
    others = []
    for each in rules:
        if (each.name, each.device) == (rule.name, rule.device):
            given = {name: value for name, value in msgspec.structs.asdict(rule).items() if value is not None}
            rule = msgspec.structs.replace(each, **given)
        else:
            others.append(each)
    return [*others, rule]


def for_ledger(limits: Limits) -> _C.Limits:
    """Limits as the ledger takes them."""
    high = None if limits.high == UNLIMITED else limits.high
    most = None if limits.max == UNLIMITED else limits.max
    return _C.Limits(limits.value, limits.min, limits.low, high, most, limits.weight)


def check_permitted(name: str, limits: Limits, grant: Grant) -> None:
    """Refuses what a user may not ask for.

    Raises:
        InvalidArgument: the value can never be right.
        NotPermitted: it is more than the user's.
    """
    if not LOWEST_VALUE <= limits.value <= HIGHEST_VALUE:
        raise InvalidArgument(
            f"account '{name}': value {limits.value} is not between {LOWEST_VALUE} and {HIGHEST_VALUE}"
        )
    most = parse_bytes(grant.max_min)
    for what, asked, allowed in (
        ("value", str(limits.value), str(grant.max_value) if limits.value > grant.max_value else ""),
        ("min", format_bytes(limits.min), format_bytes(most) if limits.min > most else ""),
    ):
        if allowed:
            raise NotPermitted(
                f"account '{name}' asks for {what} {asked}; user {grant.uid} may ask for at most {allowed}; "
                f"ask for less, or have the operator raise it in a [[grant]] of the broker's configuration"
            )


def in_force(
    name: str,
    title: str,
    devices: tuple[str, ...],
    priority: str,
    wanted: Limits,
    rules: Iterable[LimitsConfig],
) -> tuple[str, Limits]:
    """The class and limits of an account: what it wants, and over it what the operator's rules say, in order.

    What the operator has not set gives way to what is set, so that the limits stay in order.

    Args:
        name: of the account.
        title: "name/pid".
        devices: the names of its device.
        priority: the class that it wants.
        wanted: the limits that it wants.
        rules: of the operator.
    """
    given: dict[str, int | float] = {}
    for rule in rules:
        if rule.name not in (name, title, priority) or (
            rule.device is not None and rule.device not in devices
        ):
            continue
        priority = rule.priority or priority
        for field in ("value", "weight"):
            if (value := getattr(rule, field)) is not None:
                given[field] = value
        for field in ("min", "low", "high", "max"):
            if (size := getattr(rule, field)) is not None:
                given[field] = UNLIMITED if size == UNLIMITED else parse_bytes(size)
    if not given:
        return priority, wanted
    limits = wanted._replace(**given)  # type: ignore[arg-type]  # only weight is no int
    floor = max((int(given[field]) for field in ("min", "low") if field in given), default=0)
    if "max" not in given:
        limits = limits._replace(max=max(limits.max, floor))
    if "high" not in given and limits.high != UNLIMITED:
        limits = limits._replace(high=min(max(limits.high, floor), limits.max))
    ceiling = min(limits.high, limits.max)
    if "min" not in given:
        limits = limits._replace(min=min(limits.min, ceiling, limits.low if given.get("low") else ceiling))
    if "low" not in given and limits.low:
        limits = limits._replace(low=min(max(limits.low, limits.min), ceiling))
    return priority, limits
