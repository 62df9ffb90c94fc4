"""Programs under `tem run`, with a stand-in for torch that writes down what is done to it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import torch_elastic_mem as tem

REPOSITORY = Path(tem.__file__).resolve().parents[1]
TEM = [sys.executable, "-c", "from torch_elastic_mem.cli import main; main()"]

TORCH = """
import sys, types

assert not any(name.startswith("torch_elastic_mem") for name in sys.modules), "loaded before torch was"
__version__ = "9.9.1"
version = types.SimpleNamespace(cuda="13.0")
log = []
queue = []


class _CUDAAllocator:
    def __init__(self, allocator): self._allocator = allocator
    def allocator(self): return self._allocator


def init():
    log.append("CUDA is initialised")
    for call in queue: call()


class Account:
    def __init__(self, device, name, limits): self.words = f"{name} of class {limits.name} on {device}"
    def allocator(self): return self.words


class Arena:
    def __init__(self, device): self.device = device
    def account(self, name, limits): return Account(self.device, name, limits)


cuda = types.SimpleNamespace(
    is_initialized=lambda: False,
    device_count=lambda: 4,
    _lazy_call=queue.append,
    _device_count_nvml=lambda: 4,
    memory=types.SimpleNamespace(
        _CUDAAllocator=_CUDAAllocator,
        get_allocator_backend=lambda: "native",
        change_current_allocator=lambda allocator: log.append(allocator.allocator()),
    ),
)


def stand_in(name, **members):
    module = sys.modules[f"torch_elastic_mem.{name}"] = types.ModuleType(name)
    module.__dict__.update(members)


stand_in("_torch_cuda", TORCH_VERSION="9.9", make_allocator=lambda owners: f"an allocator over {owners}")
stand_in("_C", malloc_directory=lambda: "accounts", set_device_default=lambda *served: log.append(served))
stand_in("defaults", default_arena=Arena)
exec(__import__("os").environ.get("TORCH_DOES", ""))
"""

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder with the stand-in for torch."""
    folder = tmp_path / "stub"
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(TORCH)
    return folder


@pytest.fixture
def environment(stub: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a shell where `tem` and the stand-in are installed."""
    for name in [name for name in os.environ if name.startswith("TEM_")] + ["LOCAL_RANK", "PYTHONPATH"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEM_BROKER", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(stub), str(REPOSITORY)]))
    return dict(os.environ)


@pytest.fixture
def program(tmp_path: Path, environment: dict[str, str]) -> Program:
    """Runs a Python program under `tem run`, or without it."""

    def run(
        source: str,
        *options: str,
        flags: tuple[str, ...] = (),
        before: list[str] | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "program.py"
        script.write_text(textwrap.dedent(source))
        start = [*TEM, "run", *options, "--"] if before is None else before
        return subprocess.run(
            [*start, sys.executable, *flags, str(script)],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run
