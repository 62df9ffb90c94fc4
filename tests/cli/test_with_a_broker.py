"""The commands against a real broker, with tenants that speak its protocol."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from tests.broker.tenant import MiB, Tenant
from torch_elastic_mem.broker.state import AccountState, MachineState
from torch_elastic_mem.cli import main

TEM = [sys.executable, "-c", "from torch_elastic_mem.cli import main; main()"]


def tem(arguments: str) -> Result:
    return CliRunner().invoke(main, arguments.split())


def accounts() -> dict[str, AccountState]:
    state = msgspec.json.decode(tem("snapshot").stdout, type=MachineState)
    return {account.name: account for device in state.devices for account in device.accounts}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def broker(runtime: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    options = f"serve --device HOST=256MiB --reserve HOST=0,0 --metrics {port}".split()
    started = subprocess.Popen(
        [*TEM, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert started.stdout is not None
    assert started.stdout.readline().startswith("tem serve: ready")
    yield started
    started.send_signal(signal.SIGTERM)
    assert started.wait(20) == 0
    assert not list(runtime.glob("*.sock"))


@pytest.fixture
def trainer(runtime: Path, broker: object) -> Iterator[Tenant]:
    """A tenant with 200 MiB that gives what it is asked for."""
    with Tenant(runtime / "tenants.sock", "train.py") as tenant:
        account = tenant.open("fine-tune", 100)
        tenant.get(account, 200 * MiB)
        yield tenant


def while_serving(tenant: Tenant, command: str) -> Result:
    """Runs a command while a tenant answers."""
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            tenant.serve(0.05)
        tenant.serve(0.05)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        return tem(command)
    finally:
        ended.set()
        thread.join()


def test_what_a_tenant_holds_is_seen_everywhere(trainer: Tenant, port: int) -> None:
    assert accounts()["fine-tune"].lease == 200 * MiB
    assert "200 MiB" in tem("ls").stdout
    assert "fine-tune" in tem("top --once").stdout
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    (lease,) = [line for line in lines if line.startswith("tem_account_lease_bytes{")]
    assert 'account="fine-tune"' in lease and float(lease.split()[-1]) == 200 * MiB


def test_a_reclaim_brings_what_was_asked_and_says_when_it_does_not(trainer: Tenant) -> None:
    done = while_serving(trainer, "reclaim fine-tune 50MiB --timeout 5")
    assert (done.exit_code, done.stdout) == (0, "50 MiB came of 50 MiB asked\n")
    assert accounts()["fine-tune"].lease == 150 * MiB
    trainer.answer = lambda number, ask: trainer.give(number, ask.account, 0)
    done = while_serving(trainer, "reclaim fine-tune 50MiB --timeout 0.5")
    assert (done.exit_code, done.stdout) == (1, "0 B came of 50 MiB asked\n")


def test_limits_and_a_class_are_in_force_at_once_and_told_to_the_tenant(trainer: Tenant) -> None:
    done = while_serving(trainer, "limit fine-tune --min 20MiB --max 220MiB")
    assert (done.exit_code, done.stdout.split(": ")[1]) == (0, "min 20 MiB, max 220 MiB\n"), done.stderr
    assert [type(message).__name__ for _, message in trainer.others] == ["Set"]
    assert tem("priority fine-tune serving").exit_code == 0
    now = accounts()["fine-tune"]
    assert (now.priority, now.value, now.min, now.max) == ("serving", 1000, 20 * MiB, 220 * MiB)
    assert tem("limit fine-tune --max none").exit_code == 0
    assert accounts()["fine-tune"].max is None


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("limit fine-tune --min 1GiB", "min"),
        ("limit fine-tune --min 2MiB --max 1MiB", "max"),
        ("limit fine-tune --min 1 --device GPU-0", "no device 'GPU-0'"),
        ("priority fine-tune urgent", "no priority class 'urgent'"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(trainer: Tenant, command: str, said: str) -> None:
    before = accounts()["fine-tune"]
    done = tem(command)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert accounts()["fine-tune"] == before


def test_a_trace_shows_a_yield_and_whom_it_was_for(trainer: Tenant, runtime: Path) -> None:
    with Tenant(runtime / "tenants.sock", "serve.py") as server:
        account = server.open("chat", 1000)
        number = server.demand(account, 100 * MiB)
        trainer.serve(0.5)
        assert server.granted(number) == 100 * MiB
        made = json.loads(tem("trace").stdout)["traceEvents"]
    slices = [event for event in made if event["ph"] == "X"]
    assert [event["name"] for event in slices] == ["granted", "gave", "granted"]
    (start,), (end,) = ([event for event in made if event["ph"] == phase] for phase in "sf")
    assert start["tid"] == slices[1]["tid"] and end["tid"] == slices[2]["tid"]


def test_a_second_broker_is_refused_and_the_first_goes_on(
    runtime: Path, broker: subprocess.Popen[str]
) -> None:
    second = subprocess.run([*TEM, "serve"], capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert str(broker.pid) in second.stderr
    assert tem("snapshot").exit_code == 0
