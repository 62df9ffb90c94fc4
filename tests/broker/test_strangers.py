"""Whatever comes in at the tenants' socket hurts nobody but its sender."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.broker.service import SOON, MiB, Service
from tests.broker.tenant import LONG, Tenant, ended
from torch_elastic_mem.broker.protocol import (
    FREE_ONLY,
    HOST,
    Demand,
    Denied,
    Done,
    Gave,
    Hello,
    Limits,
    Open,
    Opened,
    Pass,
    Refused,
    Report,
    Return,
    SetLimits,
    Welcome,
    decode,
    encode,
)


def test_a_process_of_another_version_is_told_so(service: Service) -> None:
    tenant = Tenant(service.path, hello=False)
    hello = bytearray(encode(9, Hello(HOST, "host", "", "", 1, 1)))
    hello[0] = 2
    tenant.socket.send(hello)
    number, refused = tenant.receive() or (0, None)
    assert number == 9
    assert isinstance(refused, Refused) and refused.kind == 4
    assert "version 2; this side speaks version 1" in refused.reason
    assert ended(tenant)


@pytest.mark.parametrize(
    "garbage",
    [
        b"x",
        b"\1\0\5\0" + bytes(60),
        bytes(4096),
        bytes(100_000),
        encode(1, Welcome(1, 2)),
        encode(1, Demand(77, 0, 1, 1, 1)),
        encode(1, Demand(1, 0, 1, 1, 1))[:-1],
        encode(1, Hello(HOST, "host", "", "", 1, 1)),
        os.urandom(200),
    ],
    ids=[
        "short",
        "header",
        "zeros",
        "oversized",
        "a broker's",
        "no account",
        "truncated",
        "second hello",
        "random",
    ],
)
def test_garbage_ends_that_connection_only_and_its_bytes_stay_leased(
    service: Service, garbage: bytes
) -> None:
    with service.tenant() as good, service.tenant() as bad:
        account = good.open("good")
        bad.get(bad.open("bad"), 60 * MiB)
        bad.socket.send(garbage)
        assert ended(bad)
        assert good.get(account, 40 * MiB) == 40 * MiB
        assert isinstance(good.wait(good.demand(account, MiB, rung=FREE_ONLY)), Denied)
        # The process lives, and may come back with what it holds.
        with service.tenant() as back:
            assert back.open("bad", lease=60 * MiB)


def test_descriptors_that_nobody_asked_for_are_closed(service: Service) -> None:
    def until_held(count: int) -> None:
        end = time.monotonic() + SOON
        while held() != count:
            assert time.monotonic() < end, f"{held()} descriptors, not {count}"
            time.sleep(0.01)

    def held() -> int:
        return len(os.listdir(f"/proc/{service.pid}/fd"))

    with service.tenant() as good, service.tenant() as bad:
        account, other = good.open("good"), bad.open("bad")
        bad.get(other, MiB)
        before = held()
        for message in (Return(other, 1), Report(other, 0, 0, 0), Demand(other, 0, 1, 1, 1)):
            socket.send_fds(bad.socket, [encode(1, message)], [0] * 50)
        bad.wait(1)
        until_held(before)
        # What is to be passed on is kept for the answer that gives its bytes.
        socket.send_fds(bad.socket, [encode(1, Pass(other, 5, MiB))], [0] * 50)
        until_held(before + 50)
        socket.send_fds(bad.socket, [b"garbage"], [0] * 50)
        assert ended(bad)
        until_held(before - 1)
        assert good.get(account, MiB) == MiB


def test_nobody_makes_the_broker_keep_descriptors_without_bytes(service: Service) -> None:
    with service.tenant() as good, service.tenant() as bad:
        account, other = good.open("good", 100), bad.open("bad", 0)
        good.get(account, 90 * MiB)
        bad.get(other, MiB)
        # It would be kept for one that waits, as far as there is free memory.
        bad.demand(other, 20 * MiB, timeout=LONG)
        before = len(os.listdir(f"/proc/{service.pid}/fd"))
        for number in range(100, 120):
            socket.send_fds(bad.socket, [encode(number, Pass(other, 50, 1))], [0] * 50)
            bad.send(Gave(other, 0, 0, 0), number)
        bad.ask(SetLimits(other, Limits(0)), Done)
        assert len(os.listdir(f"/proc/{service.pid}/fd")) == before
        socket.send_fds(bad.socket, [encode(1, Pass(other, 50, 0))], [0] * 50)
        assert ended(bad)
        assert any("no bytes" in str(line["message"]) for line in service.lines())


def test_a_connection_begins_with_hello(service: Service) -> None:
    tenant = Tenant(service.path, hello=False)
    tenant.send(Demand(1, 0, 1, 1, 1))
    assert ended(tenant)
    assert any("begins with HELLO" in str(line["message"]) for line in service.lines())


def test_a_device_that_cannot_be_is_refused(service: Service) -> None:
    tenant = Tenant(service.path, hello=False)
    for hello in (
        Hello("", "cuda", "", "", 1, 1),
        Hello(HOST, "cuda", "", "", 1, 1),
        Hello("GPU-1", "cuda", "", "", 0, 1),
    ):
        assert tenant.refused(hello).kind == 1
    assert tenant.ask(Hello("GPU-1", "cuda", "", "", 100, 1), Welcome).capacity == 100


def test_one_user_has_so_many_connections_and_no_more(stopped: Service) -> None:
    stopped.config.write_text(f"[[grant]]\nuid = {os.geteuid()}\nmax_value = 1000\nconnections = 5\n")
    service = stopped.start()
    tenants = [service.tenant() for _ in range(5)]
    for _ in range(2000):
        more = Tenant(service.path, hello=False)
        _, refused = more.receive() or (0, None)
        assert isinstance(refused, Refused) and refused.kind == 5
        assert "has 5 connections already" in refused.reason
        more.socket.close()
    tenants[0].bye()
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        more = Tenant(service.path, hello=False)
        with contextlib.suppress(BrokenPipeError):  # it has been refused already
            more.send(Hello(HOST, "host", "", "", 1, 1))
        answer = more.receive()
        if answer is not None and isinstance(answer[1], Welcome):
            break
        more.socket.close()
    else:
        pytest.fail("no connection came free")
    account = tenants[1].open("a")
    assert tenants[1].get(account, MiB) == MiB


SAYS = """
import socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
for message in sys.argv[2:]:
    connection.send(bytes.fromhex(message))
    print(connection.recv(4096).hex())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_client_of_another_user_is_let_in_by_the_operator_alone_and_may_what_that_user_may() -> None:
    messages = (
        Hello(HOST, "host", "", "", 1, 1),
        Open("a", "serving", Limits(1000), 0),
        Open("b", "training", Limits(0), 0),
    )
    # One that any user may run, where there is one: the tests' own may lie in a home.
    interpreter = shutil.which("python3", path="/usr/bin") or sys.executable
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Service(Path(folder))) as service:
        os.chmod(folder, 0o755)
        service.start()
        said = [encode(number, message).hex() for number, message in enumerate(messages, 1)]
        stranger = [interpreter, "-S", "-c", SAYS, str(service.path), *said]
        try:
            shut_out = subprocess.run(stranger, user=65534, capture_output=True, text=True)
        except PermissionError:
            pytest.skip("this interpreter may be run by its owner only")
        assert "PermissionError" in shut_out.stderr and not shut_out.stdout
        os.chmod(service.directory, 0o755)
        os.chmod(service.path, 0o666)
        let_in = subprocess.run(stranger, user=65534, capture_output=True, text=True, check=True)
    welcome, refused, opened = (decode(bytes.fromhex(line))[1] for line in let_in.stdout.split())
    assert isinstance(welcome, Welcome) and isinstance(opened, Opened)
    assert isinstance(refused, Refused) and refused.kind == 5
    assert "user 65534 may ask for at most 100" in refused.reason


CHANGES = """
import contextlib, os, socket, sys, time
def come(tries):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(sys.argv[1])
    with contextlib.suppress(BrokenPipeError):  # it has been refused already
        connection.send(bytes.fromhex(sys.argv[2]))
    try:
        answer = connection.recv(4096)[2]
    except ConnectionResetError:  # told once, before the answer: HELLO was not read
        answer = connection.recv(4096)[2]
    # The end of the one before may not have been heard yet.
    if answer == 33 and tries:
        time.sleep(0.1)
        return come(tries - 1)
    print(answer)
    return connection
first = come(0)
os.seteuid(65534)
for _ in range(3):
    come(50).close()
second = come(50)
come(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_process_that_becomes_another_users_counts_for_the_one_that_it_came_as() -> None:
    hello = encode(1, Hello(HOST, "host", "", "", 1, 1)).hex()
    grants = "[[grant]]\nuid = 0\nconnections = 2\n[[grant]]\nuid = 65534\nconnections = 1\n"
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Service(Path(folder))) as service:
        os.chmod(folder, 0o755)
        service.config.write_text(grants)
        service.start()
        os.chmod(service.directory, 0o755)
        os.chmod(service.path, 0o666)
        changes = [sys.executable, "-c", CHANGES, str(service.path), hello]
        came = subprocess.run(changes, capture_output=True, text=True, check=True)
    assert list(map(int, came.stdout.split())) == [Welcome.TYPE] * 5 + [Refused.TYPE]


def test_a_broker_without_descriptors_serves_those_it_has(stopped: Service) -> None:
    stopped.before = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24));"
    service = stopped.start()
    tenant = service.tenant()
    account = tenant.open("a")
    others = []
    for _ in range(40):
        other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        other.connect(str(service.path))
        others.append(other)
    assert tenant.get(account, MiB) == MiB
    for other in others:
        other.close()
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        try:
            late = service.tenant()
        except (AssertionError, OSError):
            continue
        assert late.get(late.open("late"), MiB) == MiB
        break
    else:
        raise AssertionError("nobody was let in again")


def test_a_client_that_never_reads_is_ended_and_others_are_served(service: Service) -> None:
    with service.tenant() as deaf, service.tenant() as good:
        account = deaf.open("deaf")
        deaf.socket.settimeout(LONG)
        message = encode(5, Demand(account, 0, 1 << 40, 1 << 40, 1))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(100_000):
                deaf.socket.send(message)
        other = good.open("good")
        assert good.get(other, MiB) == MiB
    assert any("has not read 1024 messages" in str(line["message"]) for line in service.lines())
