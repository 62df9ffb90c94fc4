"""The broker's death takes nothing from anyone, and the next one learns what there is."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import torch_elastic_mem as tem
from tests.client.conftest import Opened
from tests.client.scripted import MiB, Scripted
from tests.rungs import Rung
from torch_elastic_mem.broker.protocol import (
    ADMISSION,
    EVICT,
    NOT_PERMITTED,
    WRONG_VERSION,
    Ask,
    Close,
    Demand,
    Grant,
    Hello,
    Message,
    Open,
    Refused,
    encode,
)


@pytest.fixture
def successor(tmp_path: Path, broker: Scripted) -> Iterator[list[Scripted]]:
    """Brokers that took over, to be closed."""
    made: list[Scripted] = []
    yield made
    for one in made:
        one.close()


def test_what_is_held_stays_and_grows_within_the_lease(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("32MiB")
    memory.grow("8MiB")
    unused = broker.charged[number] - account.held
    broker.close()
    memory.grow(unused)
    assert account.held == 8 * MiB + unused


def test_beyond_the_lease_it_says_that_the_broker_is_gone(opened: Opened, broker: Scripted) -> None:
    account, _ = opened()
    memory = account.range("128MiB")
    memory.grow("8MiB")
    broker.close()
    with pytest.raises(tem.OutOfMemory, match=r"tenants\.sock: it is gone, and no other has come"):
        memory.grow("96MiB", timeout=0.2)
    assert account.held == 8 * MiB


def test_a_new_broker_is_told_what_is_leased(
    tmp_path: Path, opened: Opened, broker: Scripted, successor: list[Scripted]
) -> None:
    training, number = opened("training")
    opened("serving", "serving")
    memory = training.range("32MiB")
    memory.grow("16MiB")
    lease = broker.charged[number]
    broker.close()
    successor.append(Scripted(tmp_path, epoch=2))
    opens = successor[0].await_count(Open, 2)
    assert {(one.name, one.lease) for one in opens} == {("training", lease), ("serving", 0)}
    memory.grow("16MiB")
    assert training.held == 32 * MiB


def test_what_was_freed_without_a_broker_is_not_claimed(
    tmp_path: Path, opened: Opened, broker: Scripted, successor: list[Scripted]
) -> None:
    account, number = opened()
    memory = account.range("128MiB")
    broker.free = 256 * MiB
    memory.grow("128MiB")
    before = broker.charged[number]
    broker.close()
    memory.shrink("128MiB")
    successor.append(Scripted(tmp_path, epoch=2))
    (again,) = successor[0].await_count(Open, 1)
    assert again.lease < before
    assert again.lease <= 64 * MiB


def test_a_demand_that_waits_is_asked_of_the_next_broker(
    tmp_path: Path, opened: Opened, broker: Scripted, successor: list[Scripted]
) -> None:
    broker.policy = lambda demand: None
    account, _ = opened()
    memory = account.range("8MiB")
    grown = threading.Thread(target=memory.grow, args=("8MiB",), kwargs={"timeout": 10.0})
    grown.start()
    broker.await_count(Demand, 1)
    broker.close()
    successor.append(Scripted(tmp_path, epoch=2))
    grown.join()
    assert account.held == 8 * MiB


def test_a_connection_that_was_cut_is_made_again(opened: Opened, broker: Scripted) -> None:
    account, _ = opened()
    memory = account.range("8MiB")
    broker.drop()
    broker.await_count(Open, 2)
    memory.grow("8MiB")
    assert account.held == 8 * MiB


def test_what_a_reclaimer_gives_after_the_connection_was_made_again_goes_back(
    opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = account.range("8MiB")
    memory.grow("8MiB")
    asked, go = threading.Event(), threading.Event()

    def give(nbytes: int, timeout: float) -> None:
        asked.set()
        go.wait(10)
        memory.shrink("8MiB")

    account.on_reclaim(give, "evict")
    broker.send(77, Ask(number, EVICT, broker.charged[number], 5_000_000, "other/1"))
    assert asked.wait(10)
    broker.drop()
    broker.await_count(Open, 2)
    go.set()
    broker.await_charge(0)


def test_an_account_closed_while_it_is_opened_again_leaves_nothing_behind(
    opened: Opened, broker: Scripted
) -> None:
    account, _ = opened()
    memory = account.range("8MiB")
    memory.grow("8MiB")
    broker.mute = True
    broker.drop()
    broker.await_count(Open, 2)
    memory.close()
    closing = threading.Thread(target=account.close)
    closing.start()
    closing.join(0.2)
    broker.speak()
    closing.join(10)
    broker.await_charge(0)
    broker.await_count(Close, 1)


def test_accounts_come_and_go_while_the_connection_is_cut_again_and_again(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    held, _ = opened("held")
    over = threading.Event()

    def cut() -> None:
        while not over.wait(0.001):
            broker.drop()

    cutting = threading.Thread(target=cut)
    cutting.start()
    try:
        for _ in range(500):
            arena.account("passing").close()
    finally:
        over.set()
        cutting.join()
    memory = held.range("8MiB")
    memory.grow("8MiB")
    last, _ = opened("last")
    last.range("8MiB").grow("8MiB")
    memory.close()


def test_an_account_that_a_new_broker_refuses_is_closed_without_it(opened: Opened, broker: Scripted) -> None:
    account, _ = opened()
    broker.mute = True
    broker.drop()
    broker.await_count(Open, 2)
    closing = threading.Thread(target=account.close)
    closing.start()
    closing.join(0.2)
    broker.send(broker.last(Open), Refused(ADMISSION, "there is no room for its min"))
    closing.join(3)
    assert not closing.is_alive()


@pytest.mark.parametrize(
    "message",
    [b"x", b"\0" * 16, b"\1\0\x24\0\x10\0\0\0" + b"\0" * 8, b"\1\0\xff\0\x10\0\0\0" + b"\0" * 8, b"y" * 5000],
    ids=["a byte", "zeros", "a grant too short", "an unknown type", "too long"],
)
def test_a_broker_that_talks_nonsense_is_left_and_looked_for_again(
    opened: Opened, broker: Scripted, message: bytes
) -> None:
    account, _ = opened()
    broker.send_raw(message)
    broker.await_count(Hello, 2)
    broker.await_count(Open, 2)
    memory = account.range("8MiB")
    memory.grow("8MiB")
    assert account.held == 8 * MiB


def test_a_connection_that_is_left_ends_though_a_child_of_fork_has_its_socket_too(
    opened: Opened, broker: Scripted
) -> None:
    opened()
    end, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(held)
        os.read(end, 1)
        os._exit(0)
    try:
        broker.send_raw(b"x")
        broker.await_count(Open, 2)
        broker.await_ended(1)
    finally:
        os.close(held)
        os.close(end)
        os.waitpid(pid, 0)


def test_a_grant_for_an_account_nobody_knows_is_ignored(opened: Opened, broker: Scripted) -> None:
    account, _ = opened()
    broker.send(77, Grant(4711, 8 * MiB))
    memory = account.range("8MiB")
    memory.grow("8MiB")
    assert account.held == 8 * MiB


def test_a_broker_of_another_version_is_refused_in_its_words(rung: Rung, broker: Scripted) -> None:
    refusal = bytearray(encode(0, Refused(WRONG_VERSION, "this broker speaks version 9")))
    refusal[0] = 9
    broker.refuse_hello = bytes(refusal)
    with pytest.raises(tem.BrokerError, match="this broker speaks version 9"):
        rung.arena("8MiB", broker=broker.path)


def test_a_broker_that_refuses_before_it_has_heard_anything_is_understood(rung: Rung, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        path = str(tmp_path / "full.sock")
        listening.bind(path)
        listening.listen()

        def refuse() -> None:
            with listening.accept()[0] as connected:
                connected.send(encode(0, Refused(NOT_PERMITTED, "user 7 has 64 connections already")))

        refusing = threading.Thread(target=refuse)
        refusing.start()
        with pytest.raises(tem.BrokerError, match="user 7 has 64 connections already"):
            rung.arena("8MiB", broker=path)
        refusing.join()


def test_a_broker_that_is_not_there_is_an_error_that_says_how_to_start_one(
    rung: Rung, tmp_path: Path
) -> None:
    with pytest.raises(tem.BrokerError, match="no broker listens there; start one with `tem serve`"):
        rung.arena("8MiB", broker=str(tmp_path / "nobody.sock"))


def test_a_path_that_is_too_long_for_a_socket_is_refused(rung: Rung, tmp_path: Path) -> None:
    with pytest.raises(tem.BrokerError, match="File name too long"):
        rung.arena("8MiB", broker=str(tmp_path / ("x" * 120)))


def test_by_default_the_broker_that_runs_is_found(
    rung: Rung, broker: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEM_BROKER", raising=False)
    monkeypatch.setenv("TEM_RUNTIME_DIR", str(Path(broker.path).parent))
    with tem.Arena(rung.device, capacity="8MiB") as arena:
        assert arena.broker == broker.path


def test_the_environment_names_a_broker_or_none(
    rung: Rung, broker: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEM_RUNTIME_DIR", str(Path(broker.path).parent))
    monkeypatch.setenv("TEM_BROKER", "0")
    with tem.Arena(rung.device, capacity="8MiB") as arena:
        assert arena.broker is None
    monkeypatch.setenv("TEM_BROKER", broker.path)
    with tem.Arena(rung.device, capacity="8MiB") as arena:
        assert arena.broker == broker.path


def test_the_socket_of_a_broker_that_has_died_is_no_broker(
    rung: Rung, broker: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEM_BROKER", raising=False)
    monkeypatch.setenv("TEM_RUNTIME_DIR", str(Path(broker.path).parent))
    broker.close()
    assert Path(broker.path).exists()
    with tem.Arena(rung.device, capacity="8MiB") as arena:
        assert arena.broker is None


def test_an_account_that_a_new_broker_refuses_keeps_what_it_has_and_says_why(
    tmp_path: Path, opened: Opened, broker: Scripted, successor: list[Scripted]
) -> None:
    account, _ = opened()
    memory = account.range("128MiB")
    memory.grow("8MiB")
    broker.close()

    class Strict(Scripted):
        def _book(self, number: int, message: Message) -> Message | bytes | None:
            if isinstance(message, Open):
                return Refused(5, "user 1 may not")
            return super()._book(number, message)

    strict = Strict(tmp_path, epoch=2)
    successor.append(strict)
    strict.await_count(Hello, 1)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with pytest.raises(tem.OutOfMemory) as refused:
            memory.grow("96MiB", timeout=0.1)
        if "user 1 may not" in str(refused.value):
            break
    assert "user 1 may not" in str(refused.value)
    assert account.held == 8 * MiB


def test_in_a_child_of_fork_the_connection_is_not_used(opened: Opened, broker: Scripted) -> None:
    account, _ = opened()
    count = len(broker.log)
    pid = os.fork()
    if pid == 0:
        try:
            account.reserve("8MiB")
        except tem.ForkedError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert len(broker.log) == count
    memory = account.range("8MiB")
    memory.grow("8MiB")
