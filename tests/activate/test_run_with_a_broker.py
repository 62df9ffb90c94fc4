"""`tem run` and the broker that it finds or starts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.activate.conftest import TEM
from torch_elastic_mem.broker.control import ControlClient
from torch_elastic_mem.broker.launch import connected, ensure, launch
from torch_elastic_mem.broker.paths import Paths
from torch_elastic_mem.errors import BrokerError, InvalidArgument

STARTED = "tem run: started a broker in "
TENANT = """
import torch_elastic_mem as tem
with tem.Arena("host", capacity="64MiB") as arena, arena.account("a") as account:
    print(arena.broker)
"""


def until(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def pid_of(paths: Paths) -> int:
    with ControlClient(paths.control) as client:
        return client.state().pid


def listens(paths: Paths) -> bool:
    found = connected(paths.tenants)
    if found is not None:
        found.close()
    return found is not None


@pytest.fixture
def paths(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Paths]:
    """Where a broker is to be, in a directory that is not there yet. It is stopped at the end."""
    folder = Path(tempfile.mkdtemp(prefix="tem-"))
    paths = Paths(folder / "run")
    monkeypatch.delenv("TEM_BROKER")
    monkeypatch.setenv("TEM_RUNTIME_DIR", str(paths.directory))
    yield paths
    if listens(paths):
        os.kill(pid_of(paths), signal.SIGTERM)
        until(lambda: not listens(paths))
    shutil.rmtree(folder)


def tem_run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TEM, "run", *arguments], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )


def test_a_broker_is_started_once_and_outlives_the_program(paths: Paths) -> None:
    first = tem_run("--", sys.executable, "-c", TENANT)
    assert first.stdout == f"{paths.tenants}\n", first.stderr
    assert first.stderr.startswith(STARTED) and len(first.stderr.splitlines()) == 1
    broker = pid_of(paths)
    second = tem_run("--", sys.executable, "-c", TENANT)
    assert (second.stdout, second.stderr) == (first.stdout, "")
    assert pid_of(paths) == broker


def test_two_at_once_start_one(paths: Paths) -> None:
    started = [
        subprocess.Popen([*TEM, "run", "sh", "-c", "echo $TEM_BROKER"], stdout=-1, stderr=-1, text=True)
        for _ in range(4)
    ]
    said = [each.communicate(timeout=60) for each in started]
    assert [out for out, _ in said] == [f"{paths.tenants}\n"] * 4
    assert sum(STARTED in err for _, err in said) == 1


def test_a_broker_is_no_child_of_the_program_nor_in_its_session(paths: Paths) -> None:
    program = "import os, sys; print(os.getsid(0), *open(f'/proc/{os.getpid()}/task/{os.getpid()}/children'))"
    done = tem_run("--", sys.executable, "-c", program)
    assert done.stdout.split() == [str(os.getsid(0))]
    broker = pid_of(paths)
    assert os.getsid(broker) == os.getpgid(broker) == broker
    assert os.readlink(f"/proc/{broker}/fd/1") == str(paths.directory / "broker.log")


def test_a_broker_is_there_as_long_as_the_program(paths: Paths) -> None:
    connection, started = ensure(paths.directory, ["--idle-exit", "0.4"])
    assert started
    time.sleep(1.0)
    assert listens(paths)
    connection.close()
    until(lambda: not listens(paths))
    assert not paths.tenants.exists()


@pytest.mark.parametrize(("options", "variables"), [(["--no-broker"], {}), ([], {"TEM_BROKER": "0"})])
def test_a_program_may_stand_alone(paths: Paths, options: list[str], variables: dict[str, str]) -> None:
    done = tem_run(*options, "--", sys.executable, "-c", TENANT, **variables)
    assert (done.stdout, done.stderr) == ("None\n", "")
    assert not paths.directory.exists()


def test_a_broker_that_is_named_is_left_to_be_found(paths: Paths) -> None:
    done = tem_run("sh", "-c", "echo $TEM_BROKER", TEM_BROKER="/elsewhere/tenants.sock")
    assert (done.stdout, done.stderr) == ("/elsewhere/tenants.sock\n", "")
    assert not paths.directory.exists()


def test_a_directory_that_will_not_do_runs_nothing(paths: Paths) -> None:
    paths.directory.mkdir()
    paths.directory.chmod(0o777)
    done = tem_run("echo", "ran")
    assert (done.returncode, done.stdout) == (3, "")
    assert "others may write to" in done.stderr
    assert "--no-broker" in done.stderr


def test_a_broker_that_does_not_start_is_quoted(paths: Paths) -> None:
    paths.directory.mkdir(mode=0o700)
    log = paths.directory / "broker.log"
    with pytest.raises(BrokerError, match="ended; it said: Usage"):
        launch(paths.directory, ["--no-such-option"], log)
    with pytest.raises(BrokerError, match="ended; it said: tem: "):
        ensure(paths.directory, ["--device", "HOST=much"])


def test_a_path_too_long_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="too long"):
        ensure(tmp_path / ("x" * 120), [])
