from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torch_elastic_mem as tem
from tests.broker.controlled import Control
from tests.broker.machine import machine, yielded
from torch_elastic_mem.broker import control as words
from torch_elastic_mem.broker import control_server
from torch_elastic_mem.broker.control import ControlClient

GiB = 1 << 30


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path)
    yield made
    made.close()


class Raw:
    """A connection that sends whatever it likes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("rb")

    def say(self, line: bytes) -> Any:
        self.socket.sendall(line)
        return json.loads(self.lines.readline())

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


def test_a_state_arrives_as_the_broker_told_it(control: Control) -> None:
    with ControlClient(control.path) as client:
        assert client.state() == control.broker.now == client.state()


def test_events_come_page_by_page_and_none_is_lost_or_doubled(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "EVENTS_A_PAGE", 7)
    control.broker.happened = [yielded(seq) for seq in range(1, 31)]
    with ControlClient(control.path) as client:
        assert list(client.events()) == control.broker.happened
        assert [event.seq for event in client.events(since=28)] == [29, 30]
        assert list(client.events(since=30)) == []


def test_only_the_limits_given_are_changed(control: Control) -> None:
    with ControlClient(control.path) as client:
        assert client.set_limits("chat", {"max": None, "weight": 2.5}) == 1
        assert client.set_limits("chat", {"min": 5 * GiB}, device=machine().devices[0].uuid) == 1
    assert control.broker.calls == [
        ("limits", None, "chat", {"max": None, "weight": 2.5}),
        ("limits", machine().devices[0].uuid, "chat", {"min": 5 * GiB}),
    ]


def test_a_priority_and_a_reclaim_reach_the_broker(control: Control) -> None:
    control.broker.comes = 3 * GiB
    with ControlClient(control.path) as client:
        assert client.set_priority("fine-tune", "idle") == 1
        assert client.reclaim("fine-tune", 4 * GiB, 1.5) == 3 * GiB
    assert control.broker.calls == [
        ("priority", "fine-tune", "idle"),
        ("reclaim", "fine-tune", 4 * GiB, 1.5),
    ]


def test_an_error_of_the_broker_s_is_the_same_error_here(control: Control) -> None:
    with ControlClient(control.path) as client:
        with pytest.raises(tem.AdmissionError, match="asked min 100 GiB, free 78 GiB"):
            client.set_limits("chat", {"min": 100 * GiB})
        with pytest.raises(tem.InvalidArgument, match="no account 'nobody'"):
            client.set_limits("nobody", {"min": 1})
        with pytest.raises(tem.InvalidArgument, match="no limit was given"):
            client.set_limits("chat", {})
        with pytest.raises(tem.InvalidArgument, match="maximum"):
            client.set_limits("chat", {"maximum": 3})
        with pytest.raises(tem.InvalidArgument, match="at least one byte"):
            client.reclaim("chat", 0, 1)
        assert client.state().pid == 99


def test_without_a_broker_the_error_names_the_path_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(tem.BrokerError, match=r"no broker listens at .*control.sock.*tem serve"):
        ControlClient(tmp_path / "control.sock")
    with pytest.raises(ConnectionError):
        ControlClient(tmp_path / "control.sock")


def test_a_broker_that_has_died_leaves_a_socket_and_the_error_says_so(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "control.sock"))
    left.close()
    with pytest.raises(tem.BrokerError, match=r"refused.*tem serve"):
        ControlClient(tmp_path / "control.sock")


def test_a_broker_that_goes_away_between_question_and_answer_is_an_error(control: Control) -> None:
    with ControlClient(control.path) as client:
        client.state()
        control.close()
        with pytest.raises(tem.BrokerError, match="closed the connection"):
            client.state()


def test_an_answer_of_another_version_is_an_error_that_says_so(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()
    with ControlClient(tmp_path / "control.sock") as client:
        other, _ = listener.accept()
        other.sendall(b'{"ok":{"version":"9"}}\n')
        with pytest.raises(tem.BrokerError, match="cannot read"):
            client.state()
        other.close()
    listener.close()


def test_who_is_neither_root_nor_the_broker_s_user_may_look_and_not_change(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The socket is this user's own: the broker is told that it is somebody else, and that this is not root.
    monkeypatch.setattr(control_server._Connection, "_may_change", lambda self: False)
    with ControlClient(control.path) as client:
        assert client.state().pid == 99
        assert list(client.events()) == []
        for change in (
            lambda: client.set_limits("chat", {"min": 1}),
            lambda: client.set_priority("chat", "idle"),
            lambda: client.reclaim("chat", 1, 1),
        ):
            with pytest.raises(tem.BrokerError, match="may change things"):
                change()
    assert control.broker.calls == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_the_kernel_says_who_is_there() -> None:
    asks = """
import socket, sys
for line in (b'{"op":"state"}', b'{"op":"priority","name":"chat","priority":"idle"}'):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        connection.sendall(line + b"\\n")
        print(connection.makefile().readline()[:6])
"""
    with tempfile.TemporaryDirectory() as folder:
        control = Control(Path(folder))
        os.chmod(folder, 0o755)
        os.chmod(control.path, 0o666)
        # One that any user may run, where there is one: the tests' own may lie in a home.
        interpreter = shutil.which("python3", path="/usr/bin") or sys.executable
        stranger = [interpreter, "-S", "-c", asks, str(control.path)]
        try:
            done = subprocess.run(stranger, user=65534, capture_output=True, text=True)
        except PermissionError:
            pytest.skip("this interpreter may be run by its owner only")
        finally:
            control.close()
    if "Permission denied" in done.stderr:
        pytest.skip("this interpreter may be run by its owner only")
    assert done.stdout.split() == ['{"ok":', '{"erro'], done.stderr
    assert control.broker.calls == []


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b'{"op":"shutdown"}\n',
        b'{"op":"state","since":1}\n',
        b'{"op":"limits"}\n',
        b'{"op":"limits","name":"chat","min":"much"}\n',
        b'{"op":"reclaim","name":"chat","bytes":1e99,"timeout":1}\n',
        b'{"op":"priority","name":"\xff\xfe","priority":"idle"}\n',
        b"\x00" * 100 + b"\n",
        b"[" * 60000 + b"\n",
        b"x" * (words.LARGEST_REQUEST + 1) + b"\n",
    ],
    ids=lambda line: repr(line[:24]),
)
def test_garbage_is_answered_and_ends_its_own_connection_only(control: Control, line: bytes) -> None:
    other = ControlClient(control.path)
    raw = Raw(control.path)
    answer = raw.say(line)
    assert answer["error"] and answer["kind"] in ("invalid", "refused")
    assert raw.lines.readline() == b""
    assert other.state().pid == 99
    raw.close()
    other.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.binary(max_size=300))
def test_no_bytes_stop_the_broker_or_change_anything(control: Control, line: bytes) -> None:
    raw = Raw(control.path)
    raw.socket.sendall(line)
    raw.socket.shutdown(socket.SHUT_WR)
    while raw.lines.readline():
        pass
    raw.close()
    with ControlClient(control.path) as client:
        assert client.state().pid == 99
    assert control.broker.calls == []


def test_a_reader_that_reads_nothing_is_let_go_and_disturbs_nobody(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "_SLOWEST_READER", 0.2)
    control.broker.happened = [yielded(seq) for seq in range(1, words.EVENTS_A_PAGE + 1)]
    slow = Raw(control.path)
    for _ in range(20):
        slow.socket.sendall(b'{"op":"events"}\n')
    with ControlClient(control.path) as client:
        assert client.state().pid == 99
    deadline = time.monotonic() + 10
    while control.call(lambda: len(control.server._tasks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert control.call(lambda: len(control.server._tasks)) == 0
    slow.close()


def test_a_mistake_within_the_broker_ends_only_the_connection_that_met_it(control: Control) -> None:
    control.call(lambda: control.loop.set_exception_handler(lambda loop, context: None))
    control.broker.set_priority = None  # type: ignore[method-assign, assignment]
    with ControlClient(control.path) as unlucky, pytest.raises(tem.BrokerError, match="closed"):
        unlucky.set_priority("chat", "idle")
    with ControlClient(control.path) as client:
        assert client.state().pid == 99


def test_readers_cannot_take_all_descriptors_nor_lock_the_operator_out(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "MOST_CONNECTIONS", 2)
    held = [ControlClient(control.path) for _ in range(2)]
    for each in held:
        each.state()
    with ControlClient(control.path) as client:
        assert client.state().pid == 99  # the broker's own user
    monkeypatch.setattr(control_server._Connection, "_may_change", lambda self: False)
    with ControlClient(control.path) as client, pytest.raises(tem.BrokerError, match="already has 2"):
        client.state()
    for each in held:
        each.close()
