from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.shared.processes import Broker, Sharer


@pytest.fixture
def directory() -> Iterator[Path]:
    # pytest's own is too long for a socket's path.
    with tempfile.TemporaryDirectory(prefix="tem") as made:
        Path(made).chmod(0o700)
        yield Path(made)


@pytest.fixture
def broker(directory: Path) -> Iterator[Broker]:
    made = Broker(directory)
    yield made
    if made.process.poll() is None:
        made.end()


@pytest.fixture
def sharer(broker: Broker) -> Iterator[Callable[..., Sharer]]:
    made: list[Sharer] = []

    def start(*arguments: str, **environment: str) -> Sharer:
        made.append(Sharer(broker, *arguments, **environment))
        return made[-1]

    yield start
    for each in made:
        each.end()
