"""Priority classes: who yields to whom, and the limits an account of the class starts with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.units import format_bytes, parse_bytes

# The range of a Kubernetes PriorityClass that users may define.
LOWEST_VALUE = -(2**31)
HIGHEST_VALUE = 10**9


@dataclass(frozen=True, slots=True)
class PriorityClass:
    """A class of accounts, after Kubernetes' PriorityClass, with the memory limits of cgroup v2.

    Immutable, so shared between threads freely.

    Attributes:
        name: what people call it.
        value: higher wins. A demand of a higher value makes lower ones yield.
        min: bytes never reclaimed, and promised when the account opens.
        low: bytes reclaimed only when nothing else is left.
        high: bytes above which the account trims itself and is throttled; None for no such point.
        max: bytes above which the account is out of memory by itself; None for no limit.
        weight: the share of what is left, against other accounts of the same value.

    Raises:
        InvalidArgument: a field that can never be right; the message names it.
    """

    name: str
    value: int
    min: int = 0
    low: int = 0
    high: int | None = None
    max: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InvalidArgument(f"a priority class needs a name, a text; got {self.name!r}")
        if not _is_int(self.value) or not LOWEST_VALUE <= self.value <= HIGHEST_VALUE:
            raise InvalidArgument(
                f"{self._field('value')} must be an int between {LOWEST_VALUE} and {HIGHEST_VALUE}"
            )
        for limit in ("min", "low"):
            self._check_bytes(limit)
        for limit in ("high", "max"):
            if getattr(self, limit) is not None:
                self._check_bytes(limit)
        if self.max is not None and self.min > self.max:
            least, most = format_bytes(self.min), format_bytes(self.max)
            raise InvalidArgument(f"priority class {self.name!r}: min={least} is above max={most}")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise InvalidArgument(f"{self._field('weight')} must be a number above 0")

    def _check_bytes(self, field: str) -> None:
        limit = getattr(self, field)
        if not _is_int(limit):
            raise InvalidArgument(f"{self._field(field)} must be bytes, an int; parse_bytes reads '4GiB'")
        try:
            parse_bytes(limit)
        except InvalidArgument as error:
            raise InvalidArgument(f"{self._field(field)}: {error}") from None

    def _field(self, field: str) -> str:
        return f"priority class {self.name!r}: {field}={getattr(self, field)!r}"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_BUILT_IN = {
    known.name: known
    for known in (
        PriorityClass("idle", 0),
        PriorityClass("training", 100),
        PriorityClass("serving", 1000),
        PriorityClass("critical", 10000),
    )
}


def priority(name: str) -> PriorityClass:
    """The built-in class of that name: "idle", "training", "serving" or "critical".

    Raises:
        InvalidArgument: there is no such class.
    """
    known = _BUILT_IN.get(name)
    if known is None:
        names = ", ".join(map(repr, _BUILT_IN))
        raise InvalidArgument(f"no priority class {name!r}: use one of {names}, or pass a PriorityClass")
    return known
