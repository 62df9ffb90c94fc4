from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.alloc.home import Home
from tests.rungs import Rung


@pytest.fixture
def home(rung: Rung) -> Iterator[Home]:
    """Closed at the end: a test must leave no block and no pool."""
    made = Home(rung)
    yield made
    made.close()
