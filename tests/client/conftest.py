"""An arena under a broker that tests write the lines of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import torch_elastic_mem as tem
from tests.client.scripted import Scripted
from tests.rungs import Rung


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Scripted]:
    made = Scripted(tmp_path)
    yield made
    made.close()


@pytest.fixture
def arena(rung: Rung, broker: Scripted) -> tem.Arena:
    return rung.arena("128MiB", broker=broker.path)


Opened = Callable[..., tuple[tem.Account, int]]


@pytest.fixture
def opened(arena: tem.Arena, broker: Scripted) -> Opened:
    """Opens an account; returns it and the broker's number of it."""

    def open_account(
        name: str = "training", priority: str = "training", **limits: object
    ) -> tuple[tem.Account, int]:
        account = arena.account(name, priority, **limits)  # type: ignore[arg-type]
        number = next(number for number, known in broker.names.items() if known == name)
        return account, number

    return open_account
