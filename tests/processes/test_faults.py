"""Whatever process dies, at whatever step, its bytes are leased again and nobody else is disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from tests.processes.conftest import Machine, MiB, Refused

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def kill_at(tmp_path_factory: pytest.TempPathFactory) -> str:
    library = tmp_path_factory.mktemp("kill_at") / "kill_at.so"
    compiler = (os.environ.get("CXX") or "g++").split()
    source = HERE / "kill_at.cpp"
    subprocess.run([*compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


def test_what_a_killed_process_held_is_leased_again(machine: Machine) -> None:
    hog = machine.peer("serving")
    hog("grow", 120 * MiB)
    hog.kill()
    taker = machine.peer("training")
    assert taker("grow", 120 * MiB) == 120 * MiB


def test_a_demander_that_is_killed_while_it_waits_leaves_nothing(machine: Machine) -> None:
    hog = machine.peer("training", keep=False)
    hog("grow", 120 * MiB)
    hog("reclaimer", "evict", 0.5)
    taker = machine.peer("serving")
    taker.tell("grow", 64 * MiB)
    assert hog("await_asked")
    taker.kill()
    machine.await_leased(hog("held") + unused(machine))
    other = machine.peer("serving")
    assert other("grow", 32 * MiB) == 32 * MiB


def unused(machine: Machine) -> int:
    """Bytes leased to processes and not held: what small growths cost no message for."""
    state = machine.state()
    assert state is not None
    return sum(account.lease - account.held for account in state.accounts)


def test_a_victim_that_is_killed_while_it_gives_up_memory_gives_all_of_it(machine: Machine) -> None:
    hog = machine.peer("training", keep=False)
    hog("grow", 120 * MiB)
    hog("reclaimer", "evict", 20.0)
    taker = machine.peer("serving")
    taker.tell("grow", 120 * MiB)
    assert hog("await_asked")
    hog.kill()
    assert taker.hear() == 120 * MiB


def test_a_stopped_process_owes_and_others_are_served_from_elsewhere(machine: Machine) -> None:
    stopped = machine.peer("idle")
    stopped("grow", 64 * MiB)
    stopped("shrink", 64 * MiB)
    willing = machine.peer("training")
    willing("grow", 56 * MiB)
    willing("shrink", 56 * MiB)
    os.kill(stopped.pid, signal.SIGSTOP)
    taker = machine.peer("serving")
    assert taker("grow", 40 * MiB) == 40 * MiB
    state = machine.state()
    assert state is not None
    assert "debtor" in {account.state for account in state.accounts}
    os.kill(stopped.pid, signal.SIGCONT)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        state = machine.state()
        assert state is not None
        if "debtor" not in {account.state for account in state.accounts}:
            break
        time.sleep(0.05)
    else:
        pytest.fail("it has not paid")
    assert stopped("held") < 64 * MiB


def test_a_forked_child_that_keeps_the_socket_keeps_no_memory(machine: Machine) -> None:
    parent = machine.peer("serving")
    parent("grow", 120 * MiB)
    child = parent("fork")
    try:
        parent.process.kill()
        parent.process.wait()
        taker = machine.peer("serving")
        assert taker("grow", 120 * MiB) == 120 * MiB
    finally:
        os.kill(child, signal.SIGKILL)


def test_without_a_broker_tenants_go_on_and_the_next_one_learns_what_they_hold(machine: Machine) -> None:
    hog = machine.peer("training")
    hog("grow", 64 * MiB)
    other = machine.peer("serving")
    other("grow", 32 * MiB)
    machine.service.stop(signal.SIGKILL)
    hog("shrink", 64 * MiB)
    with pytest.raises(Refused, match="broker"):
        other("grow", 96 * MiB, 0.3)
    machine.service.start()
    assert other("grow", 80 * MiB) == 112 * MiB
    state = machine.state()
    assert state is not None
    assert state.leased <= state.capacity


def test_a_tenant_that_stands_still_while_the_broker_is_replaced_is_waited_for(machine: Machine) -> None:
    hog = machine.peer("training")
    hog("grow", 100 * MiB)
    os.kill(hog.pid, signal.SIGSTOP)
    machine.service.stop(signal.SIGKILL)
    machine.service.start()
    taker = machine.peer("training")
    with pytest.raises(Refused):
        taker("grow", 100 * MiB, 1.5)
    os.kill(hog.pid, signal.SIGCONT)
    deadline = time.monotonic() + 20
    while (state := machine.state()) is None or state.leased < 100 * MiB:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert state.leased <= state.capacity


def test_a_demand_that_waits_when_the_broker_dies_is_granted_by_the_next(machine: Machine) -> None:
    hog = machine.peer("training", keep=False)
    hog("grow", 120 * MiB)
    hog("reclaimer", "evict", 1.0)
    taker = machine.peer("serving")
    taker.tell("grow", 64 * MiB, 20.0)
    assert hog("await_asked")
    machine.service.stop(signal.SIGKILL)
    machine.service.start()
    assert taker.hear() == 64 * MiB


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["send", "recv"])
def test_killed_at_any_message_of_a_growth_a_process_leaves_nothing(
    machine: Machine, kill_at: str, call: str, when: str
) -> None:
    assert sysconfig.get_platform().startswith("linux")
    died = 0
    for number in range(1, 9):
        extra = {"LD_PRELOAD": kill_at, "TEM_KILL_AT": f"{call} {number} {when}"}
        try:
            victim = machine.launch("training", **extra).ready()
            victim("grow", 32 * MiB)
            victim("grow", 64 * MiB)
            victim("shrink", 96 * MiB)
            victim("close")
        except EOFError:
            died += 1
        machine.peers[-1].kill()
        machine.await_leased(0)
    assert died >= 3


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["send", "recv"])
def test_killed_at_any_message_of_a_yield_a_victim_gives_all_of_it(
    machine: Machine, kill_at: str, call: str, when: str
) -> None:
    for number in range(3, 9):
        extra = {"LD_PRELOAD": kill_at, "TEM_KILL_AT": f"{call} {number} {when}"}
        try:
            victim = machine.launch("training", keep=False, **extra).ready()
            victim("grow", 120 * MiB)
            victim("reclaimer", "evict")
        except EOFError:
            pass
        taker = machine.peer("serving")
        assert taker("grow", 64 * MiB) == 64 * MiB
        machine.peers[-2].kill()
        taker.kill()
        machine.await_leased(0)
