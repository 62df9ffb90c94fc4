"""The three rungs.

A test that takes `rung` runs on the host backend, on the real CUDA backend over the fake driver,
and, where there is a GPU and `--rung` says so, on that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rungs import CudaRung, FakeRung, HostRung, Rung

MiB = 1 << 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rung",
        action="append",
        choices=["host", "fake", "cuda"],
        help="where tests of the core run; may be given several times (default: host and fake)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A broker of this machine's user has no part in the tests.
    os.environ["TEM_BROKER"] = "0"
    # The long style prints arguments. Printing a cache reads blocks without memory, and a GPU that has
    # faulted once fails every test that comes after.
    if "cuda" in (config.getoption("--rung") or []) and config.option.tbstyle == "auto":
        config.option.tbstyle = "short"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rung" in metafunc.fixturenames:
        names = metafunc.config.getoption("--rung") or ["host", "fake"]
        marked = {mark.args[0] for mark in metafunc.definition.iter_markers("rungs")}
        wanted = [name for name in names if not marked or name in marked]
        slow = {mark.args[0] for mark in metafunc.definition.iter_markers("slow_on")}
        params = [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in wanted]
        metafunc.parametrize("rung", params, indirect=True)


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The fake libcuda.so.1, built once and kept between runs."""
    from tests.fake_cuda.build import build

    return build(request.config.rootpath / "build" / "fake_cuda")


@pytest.fixture
def rung(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rung]:
    made: Rung
    if request.param == "host":
        made = HostRung()
    elif request.param == "fake":
        made = FakeRung(request.getfixturevalue("fake_library"), monkeypatch)
    else:
        made = CudaRung()
    made.watch_reclaimers(monkeypatch)
    yield made
    made.close()
