"""What an arena's tenants need to know of its device."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch_elastic_mem.errors import InvalidArgument

# Decades: what nobody tells from for ever, and what the core can still count in nanoseconds.
_LONGEST = 1e9


@dataclass(frozen=True, slots=True)
class Device:
    """An arena's device. Immutable.

    Attributes:
        backend: "host" or "cuda".
        name: as torch names it: "cpu" or "cuda:0".
        index: torch's index of a CUDA device; 0 on the host.
        granularity: bytes; memory comes in multiples of it.
        yield_timeout: seconds a demand waits for others to yield, where the call names no timeout.
    """

    backend: str
    name: str
    index: int
    granularity: int
    yield_timeout: float

    def __post_init__(self) -> None:
        _checked(self.yield_timeout)

    def seconds(self, timeout: float | None) -> float:
        """A timeout in seconds; `yield_timeout` for None.

        Raises:
            InvalidArgument: a negative one.
        """
        return _checked(self.yield_timeout if timeout is None else timeout)


def device_of(device: str) -> tuple[str, int]:
    """The backend and the index that a device's name stands for.

    Raises:
        InvalidArgument: it stands for none.
    """
    if device in ("host", "cpu"):
        return "host", 0
    found = re.fullmatch(r"cuda(?::(\d{1,4}))?", device, re.ASCII) if isinstance(device, str) else None
    if found:
        return "cuda", int(found[1] or 0)
    raise InvalidArgument(f"unknown device {device!r}: use 'host', 'cuda' or 'cuda:N'")


def cuda_index(device: str) -> int:
    """The index of a CUDA device, by its name.

    Raises:
        InvalidArgument: it is the name of no CUDA device.
    """
    kind, index = device_of(device)
    if kind != "cuda":
        raise InvalidArgument(f"{device!r} is no CUDA device: use 'cuda' or 'cuda:N'")
    return index


def _checked(timeout: float) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        raise InvalidArgument(f"a timeout is in seconds and not negative; got {timeout!r}")
    return min(timeout, _LONGEST)
