"""What `tem run` passes on to the program's interpreters, through the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch_elastic_mem.device import cuda_index
from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.priority import priority

ENABLE = "TEM_ENABLE"
PRIORITY = "TEM_PRIORITY"
NAME = "TEM_NAME"
DEVICE = "TEM_DEVICE"


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

    Raises:
        InvalidArgument: no such class, or the name of no CUDA device; the message names the variable.
    """

    priority: str = "training"
    name: str = ""
    devices: tuple[str, ...] = ()

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

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings:
        """From an environment. A variable that is empty counts as unset."""
        devices = environment.get(DEVICE, "").split(",")
        return cls(
            environment.get(PRIORITY) or "training",
            environment.get(NAME, ""),
            tuple(device.strip() for device in devices if device.strip()),
        )

    def variables(self) -> dict[str, str]:
        """The environment that `read` makes these settings of, and that enables them."""
        return {
            ENABLE: "1",
            PRIORITY: self.priority,
            NAME: self.name,
            DEVICE: ",".join(self.devices),
        }

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
