from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker.controlled import Control


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory in which commands look for a broker: a short one, as a socket's path must be."""
    folder = Path(tempfile.mkdtemp(prefix="tem-"))
    monkeypatch.setenv("TEM_RUNTIME_DIR", str(folder))
    monkeypatch.delenv("TEM_BROKER", raising=False)
    os.chmod(folder, 0o700)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def control(runtime: Path) -> Iterator[Control]:
    made = Control(runtime)
    yield made
    made.close()
