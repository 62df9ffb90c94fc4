from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker.service import Service


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Service]:
    """A broker that the test starts."""
    service = Service(tmp_path)
    yield service
    service.close()


@pytest.fixture
def service(stopped: Service) -> Service:
    """A broker that serves."""
    return stopped.start()
