"""Whatever process dies, at whatever step, its bytes are leased again and nobody else is disturbed."""

from __future__ import annotations

import os
import resource
import signal
import struct
import sysconfig
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path

import pytest

from tests.processes.conftest import LONG, Machine, MiB, Peer, Refused, preload
from torch_elastic_mem.broker.control import ControlClient


@pytest.fixture(scope="session")
def kill_at(tmp_path_factory: pytest.TempPathFactory) -> str:
    return preload(tmp_path_factory.mktemp("kill_at"), "kill_at")


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


def await_true(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def await_no_account(machine: Machine) -> None:
    """The broker has seen a process, and knows no account."""
    await_true(lambda: (state := machine.state()) is not None and not state.accounts)
    machine.await_leased(0)


def assert_let_go(machine: Machine, peer: Peer) -> None:
    """The broker has no account of a process that lives, and another may have all."""
    await_no_account(machine)
    assert peer.process.poll() is None
    other = machine.peer("training")
    assert other("grow", 120 * MiB) == 120 * MiB


def test_an_account_that_is_closed_while_the_connection_is_lost_is_closed_at_the_broker_too(
    machine: Machine,
) -> None:
    peer = machine.peer("training")
    peer("grow", 64 * MiB)
    os.kill(machine.service.pid, signal.SIGSTOP)
    try:
        assert peer("cut") == 1
        peer("close_account")
    finally:
        os.kill(machine.service.pid, signal.SIGCONT)
    assert_let_go(machine, peer)


@pytest.mark.slow
def test_an_account_that_is_closed_while_the_broker_stands_still_with_a_demand_unread_is_closed_there_too(
    machine: Machine,
) -> None:
    peer = machine.peer("training")
    os.kill(machine.service.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, machine.service.pid, os.WSTOPPED)
    try:
        with pytest.raises(Refused, match="does not answer"):
            peer("grow", 32 * MiB, 0.1)
        peer("close_account")
    finally:
        os.kill(machine.service.pid, signal.SIGCONT)
    assert_let_go(machine, peer)


@pytest.mark.rungs("host")
def test_a_process_that_may_have_no_more_threads_gives_what_it_can_without_and_goes_on(
    machine: Machine, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    library = preload(tmp_path, "no_threads")
    hog = machine.launch("training", LD_PRELOAD=library, TEM_NO_THREADS=str(full)).ready()
    hog("grow", 120 * MiB)
    hog("shrink", 40 * MiB)
    hog("reclaimer", "evict")
    full.touch()
    taker = machine.peer("serving")
    assert taker("grow", 32 * MiB) == 32 * MiB
    with pytest.raises(Refused, match="free"):
        taker("grow", 64 * MiB, 1.0)
    assert hog("held") >= 80 * MiB
    with ControlClient(machine.service.directory / "control.sock") as control:
        control.set_limits("training", {"max": 64 * MiB})
    time.sleep(0.3)
    assert hog("was_asked") == [], "nobody can be called"
    full.unlink()
    await_true(lambda: hog("held") <= 64 * MiB)
    assert taker("grow", 64 * MiB) == 96 * MiB


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


def take_all_descriptors(pid: int) -> None:
    """It opens no more, until it closes some."""
    taken = {int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir()}
    lowest = next(number for number in count() if number not in taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, lowest))


@pytest.mark.rungs("host")
@pytest.mark.rungs("fake")  # who knows when the real driver needs some
@pytest.mark.parametrize("who", ["giver", "broker", "taker"])
def test_who_can_open_no_descriptors_gives_and_gets_memory_by_way_of_the_device(
    machine: Machine, who: str
) -> None:
    hog, taker = machine.peer("training"), machine.peer("serving")
    taker("grow", 4 * MiB)
    hog("grow", 120 * MiB)
    ((file, _),) = hog.files().items()
    # Before anything is idle, which is exported ahead.
    take_all_descriptors({"giver": hog.pid, "broker": machine.service.pid, "taker": taker.pid}[who])
    hog("shrink", 120 * MiB)
    assert taker("grow", 64 * MiB) == 68 * MiB
    assert file not in taker.files()
    assert hog("held") <= 60 * MiB


@pytest.fixture
def wall_clock(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[timedelta], None]:
    """Sets the wall clock that a broker and its tenants see from now on; it is hours ahead already."""
    file = tmp_path / "ahead"

    def set_ahead(ahead: timedelta) -> None:
        with file.open("r+b" if file.exists() else "wb") as opened:
            opened.write(struct.pack("q", int(ahead.total_seconds()) * 10**9))

    set_ahead(timedelta(hours=5))
    library = preload(tmp_path, "wall_clock")
    machine.service.stop()
    monkeypatch.setenv("LD_PRELOAD", library)
    monkeypatch.setenv("TEM_WALL_CLOCK", str(file))
    machine.service.start()
    assert library in Path(f"/proc/{machine.service.pid}/maps").read_text()
    return set_ahead


@pytest.mark.parametrize("ahead", [timedelta(days=400), timedelta(days=-400)], ids=["ahead", "back"])
def test_a_wall_clock_that_jumps_ends_no_wait_and_makes_none_longer(
    machine: Machine, wall_clock: Callable[[timedelta], None], ahead: timedelta
) -> None:
    hog, patient, hasty = (
        machine.peer("training", keep=False),
        machine.peer("serving"),
        machine.peer("serving"),
    )
    hog("grow", 120 * MiB)
    hog("reclaimer", "evict", 1.0)
    before = patient("wall_clock")
    patient.tell("grow", 64 * MiB, 60.0)
    assert hog("await_asked")
    hasty.tell("grow", 120 * MiB, 1.5)
    wall_clock(ahead)
    with pytest.raises(Refused, match="is free after"):
        hasty.hear()
    assert patient.hear() == 64 * MiB
    assert abs(patient("wall_clock") - before - ahead.total_seconds()) < 86_400
    for peer in (hog, patient, hasty):
        peer.kill()
    machine.await_leased(0)


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
def test_killed_at_any_message_of_a_demand_that_another_meets_a_process_leaves_nothing(
    machine: Machine, kill_at: str, call: str, when: str
) -> None:
    hog = machine.peer("training")
    died = 0
    for number in range(2, 7):
        # All of it is there again.
        hog("grow", 120 * MiB)
        hog("shrink", 120 * MiB)
        extra = {"LD_PRELOAD": kill_at, "TEM_KILL_AT": f"{call} {number} {when}"}
        try:
            machine.launch("serving", **extra).ready()("grow", 64 * MiB)
        except EOFError:
            died += 1
        machine.peers[-1].kill()
    hog("close")
    machine.await_leased(0)
    assert died >= 2


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["send", "recv"])
@pytest.mark.parametrize("gives", ["what it uses", "what it keeps"])
def test_killed_at_any_message_of_a_yield_a_victim_gives_all_of_it(
    machine: Machine, kill_at: str, gives: str, call: str, when: str
) -> None:
    died = 0
    for number in range(3, 9):
        extra = {"LD_PRELOAD": kill_at, "TEM_KILL_AT": f"{call} {number} {when}"}
        try:
            victim = machine.launch("training", keep=gives == "what it keeps", **extra).ready()
            victim("grow", 120 * MiB)
            # What is kept is passed on, as it is.
            victim("reclaimer", "evict") if gives == "what it uses" else victim("shrink", 120 * MiB)
        except EOFError:
            pass
        taker = machine.peer("serving")
        assert taker("grow", 64 * MiB) == 64 * MiB
        died += machine.peers[-2].process.poll() is not None
        machine.peers[-2].kill()
        taker.kill()
        machine.await_leased(0)
    # A grant and an ask are the least that it hears.
    assert died >= 2
