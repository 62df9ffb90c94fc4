from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker.controlled import Control


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path)
    yield made
    made.close()
