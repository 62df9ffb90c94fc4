"""Both tenants and the memory they share, whether they run in one process or in two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch_elastic_mem.demo.pool import Pool
from torch_elastic_mem.demo.scale import Scale
from torch_elastic_mem.demo.side import Serving, Training


@dataclass(frozen=True)
class Setting:
    """What is played: how large, where, for how long."""

    backend: str
    capacity: int
    scale: Scale
    seconds: float


class Pair(Protocol):
    """Both tenants. A context that ends them, gently or not.

    Attributes:
        processes: How many they run in. device: As torch names it.
    """

    @property
    def setting(self) -> Setting: ...
    @property
    def training(self) -> Training: ...
    @property
    def serving(self) -> Serving: ...
    @property
    def pool(self) -> Pool: ...
    @property
    def processes(self) -> int: ...
    @property
    def device(self) -> str: ...

    def close(self) -> int:
        """Has both give back all that they hold; returns the bytes that did not come back."""
