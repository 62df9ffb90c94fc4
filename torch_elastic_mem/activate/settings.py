"""What `tem run` passes on to the program's interpreters, through the environment."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch_elastic_mem.broker import paths
from torch_elastic_mem.device import cuda_index
from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.priority import PriorityClass, priority
from torch_elastic_mem.units import parse_bytes

ENABLE = "TEM_ENABLE"
PRIORITY = "TEM_PRIORITY"
NAME = "TEM_NAME"
DEVICE = "TEM_DEVICE"
# Of the account's limits, by name.
LIMITS = {name: f"TEM_{name.upper()}" for name in ("min", "low", "high", "max", "weight")}
BROKER = paths.BROKER
# All that mean something to a program that runs.
VARIABLES = (ENABLE, PRIORITY, NAME, DEVICE, *LIMITS.values(), BROKER, paths.DIRECTORY)


def misspelt(environment: Mapping[str, str]) -> list[str]:
    """What is to be said of variables that look like one of `VARIABLES` and are none."""
    said = []
    for name in sorted(environment):
        if not name.startswith("TEM_") or name in VARIABLES:
            continue
        if close := difflib.get_close_matches(name, VARIABLES, 1, 0.8):
            said.append(f"{name} means nothing here; did you mean {close[0]}?")
    return said


def enabled(environment: Mapping[str, str]) -> bool:
    """Whether `tem run` is to do anything: TEM_ENABLE=0 has the command run as if without it.

    Raises:
        InvalidArgument: TEM_ENABLE is neither 0 nor 1.
    """
    given = environment.get(ENABLE, "1")
    if given not in ("0", "1"):
        raise InvalidArgument(f"{ENABLE} is {given!r}; it may be '0', '1' or unset")
    return given == "1"


@dataclass(frozen=True, slots=True)
class Settings:
    """The account that torch's memory is charged to. Immutable.

    Attributes:
        priority: the name of its class.
        name: its name; empty: that of its class.
        devices: "cuda" or "cuda:N", each of which has such an account. Empty: the process's own device.
        limits: as written, by their names, of `LIMITS`; the class's where there is none.

    Raises:
        InvalidArgument: no such class, the name of no CUDA device, or limits that cannot be; the message
            names the variable.
    """

    priority: str = "training"
    name: str = ""
    devices: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for variable, check, values in (
            (PRIORITY, priority, [self.priority]),
            (DEVICE, cuda_index, self.devices),
        ):
            for value in values:
                try:
                    check(value)
                except InvalidArgument as error:
                    raise InvalidArgument(f"{variable}: {error}") from None
        self.priority_class()

    def priority_class(self) -> PriorityClass:
        """The class, with the limits that are given put over its own."""
        read: dict[str, Any] = {}
        for limit, text in self.limits.items():
            try:
                read[limit] = _limit(limit, text)
            except InvalidArgument as error:
                raise InvalidArgument(f"{LIMITS[limit]}: {error}") from None
        try:
            return replace(priority(self.priority), **read)
        except InvalidArgument as error:
            given = ", ".join(f"{LIMITS[limit]}={text}" for limit, text in self.limits.items())
            raise InvalidArgument(f"{given}: {error}") from None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings:
        """From an environment. A variable that is empty counts as unset."""
        devices = environment.get(DEVICE, "").split(",")
        return cls(
            environment.get(PRIORITY) or "training",
            environment.get(NAME, ""),
            tuple(device.strip() for device in devices if device.strip()),
            {limit: text for limit, variable in LIMITS.items() if (text := environment.get(variable))},
        )

    def variables(self) -> dict[str, str]:
        """The environment that `read` makes these settings of, and that enables them."""
        return {
            ENABLE: "1",
            PRIORITY: self.priority,
            NAME: self.name,
            DEVICE: ",".join(self.devices),
        } | {LIMITS[limit]: text for limit, text in self.limits.items()}

    def indices(self, environment: Mapping[str, str], visible: int) -> list[int]:
        """The devices to serve, by index.

        Without `devices` it is the one that a launcher such as torchrun gave the process by LOCAL_RANK, and
        otherwise the first: an arena takes memory on its device even where nobody uses it.

        Args:
            environment: of this process, when it initialises CUDA.
            visible: how many devices the process sees.
        """
        if self.devices:
            return [cuda_index(device) for device in self.devices]
        rank = environment.get("LOCAL_RANK", "")
        # Some launchers show each process nothing but its own device, which then is the first.
        return [int(rank) if rank.isdecimal() and int(rank) < visible else 0]


def _limit(name: str, text: str) -> int | float | None:
    """Reads a limit; "none" takes an upper one away that the class has."""
    if name == "weight":
        try:
            return float(text)
        except ValueError:
            raise InvalidArgument(f"{text!r} is not a weight: give a number above 0, such as 2") from None
    return None if text == "none" and name in ("high", "max") else parse_bytes(text)
