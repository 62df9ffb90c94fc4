"""The commands that read: top, ls, snapshot and trace."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from tests.broker.controlled import Control
from tests.broker.machine import account, device, granted, machine, yielded
from torch_elastic_mem.broker.state import MachineState
from torch_elastic_mem.cli import main

# A shell's background job ignores interrupts, and its children inherit that.
TAKES_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
TEM = [sys.executable, "-c", TAKES_INTERRUPTS + "from torch_elastic_mem.cli import main; main()"]


def tem(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    "arguments",
    ["top --once", "top", "ls", "snapshot", "trace", "limit a --min 1", "priority a idle", "reclaim a 1"],
)
def test_without_a_broker_the_exit_code_is_3_and_the_message_says_where_and_how(
    runtime: Path, arguments: str
) -> None:
    done = tem(*arguments.split())
    assert done.exit_code == 3
    assert done.stdout == ""
    assert str(runtime / "control.sock") in done.stderr and "tem serve" in done.stderr


@pytest.mark.parametrize("arguments", ["snapshot", "top --json"])
def test_a_snapshot_is_the_state_and_nothing_else(control: Control, arguments: str) -> None:
    done = tem(*arguments.split())
    assert done.exit_code == 0
    assert msgspec.json.decode(done.stdout, type=MachineState) == control.broker.now


def test_top_prints_one_picture_where_asked(control: Control) -> None:
    done = tem("top", "--once")
    assert done.exit_code == 0
    assert "fine-tune" in done.stdout and "chat" in done.stdout


def test_ls_has_a_line_for_each_account(control: Control) -> None:
    done = tem("ls")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["PID", "4712", "4711"]
    assert lines[4:] == ["  chat/4712, 10,239 blocks: 500 in use, 1,500 cached, 48 free, 8,191 parked"]
    listed = json.loads(tem("ls", "--json").stdout)
    found = {each["name"]: each["blocks"] for each in listed[machine().devices[0].uuid]}
    assert found == {
        "chat": {"in_use": 500, "cached": 1500, "free": 48, "parked": 8191},
        "fine-tune": None,
    }


def test_ls_of_nothing_exits_with_1(control: Control) -> None:
    control.broker.now = machine(device())
    done = tem("ls")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no process has an account" in done.stderr
    assert json.loads(tem("ls", "--json").stdout) == {machine().devices[0].uuid: []}


def test_trace_writes_a_file_or_to_stdout(control: Control, tmp_path: Path) -> None:
    control.broker.happened = [yielded(1), granted(2)]
    done = tem("trace", "-o", str(tmp_path / "trace.json"))
    assert (done.exit_code, done.stdout) == (0, "")
    made = json.loads((tmp_path / "trace.json").read_text())
    assert {event["ph"] for event in made["traceEvents"]} >= {"M", "X", "s", "f", "C"}
    assert json.loads(tem("trace").stdout) == made
    later = json.loads(tem("trace", "--since", "1").stdout)
    assert [event["name"] for event in later["traceEvents"] if event["ph"] == "X"] == ["granted"]


def test_a_trace_of_nothing_is_empty_and_exits_with_1(control: Control) -> None:
    done = tem("trace")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["traceEvents"] == []


def test_a_file_that_cannot_be_written_is_an_error(control: Control, tmp_path: Path) -> None:
    done = tem("trace", "-o", str(tmp_path / "no" / "trace.json"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "No such file or directory" in done.stderr


@pytest.mark.parametrize("command", ["ls", "top --once", "limit x --min 1", "priority x idle"])
def test_names_of_other_processes_do_nothing_to_the_terminal(control: Control, command: str) -> None:
    control.broker.now = machine(device(account("\x1b[2J\x07", process="\x9b31m"), label="\x1b]0;x\x07"))
    done = tem(*command.split())
    assert all(letter.isprintable() or letter in "\n\xa0" for letter in done.output)


def test_nor_do_those_within_an_error_of_the_broker_s(control: Control) -> None:
    control.broker.now = machine(device(account("\x1b[2J", lease=0)))
    control.broker.words = "\x1b[2J holds the rest"
    done = tem("limit", "training", "--min", "100GiB")
    assert (done.exit_code, done.stderr) == (2, "tem: ?[2J holds the rest\n")


def test_what_reads_loads_no_torch_and_no_core(control: Control) -> None:
    for command in ("ls", "snapshot", "trace", "top --once", "doctor --json", "config --show"):
        code = (
            "import sys\n"
            "from torch_elastic_mem.cli import main\n"
            f"try:\n    main({command.split()!r}, standalone_mode=False)\n"
            "except SystemExit:\n    pass\n"
            "assert 'torch' not in sys.modules\n"
            "assert 'asyncio' not in sys.modules, 'slow to import'\n"
            "assert 'prometheus_client' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def watched(arguments: list[str], seconds: float = 20, **environment: str) -> tuple[bytes, int]:
    """What a command shows on a terminal until it has shown an account; then Ctrl-C. And its exit code."""
    master, slave = pty.openpty()
    started = subprocess.Popen(
        [*TEM, *arguments], stdin=slave, stdout=slave, stderr=slave, env=os.environ | environment
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + seconds
    try:
        while shown.count(b"fine-tune") < 3 and time.monotonic() < deadline:
            shown += os.read(master, 65536)
        started.send_signal(signal.SIGINT)
        while True:
            try:
                shown += os.read(master, 65536)
            except OSError:
                break
        return shown, started.wait(10)
    finally:
        started.kill()
        started.wait()
        os.close(master)


def test_top_is_live_until_interrupted_and_leaves_the_terminal_as_it_was(control: Control) -> None:
    shown, code = watched(["top", "--interval", "0.1"], TERM="xterm-256color", COLUMNS="120", LINES="40")
    assert code == 0
    assert b"\x1b[?1049h" in shown and shown.rindex(b"\x1b[?1049l") > shown.rindex(b"fine-tune")
    assert b"\x1b[34m" in shown or b"\x1b[38" in shown


def test_no_colour_where_none_is_wanted(control: Control) -> None:
    shown, _ = watched(["top", "--interval", "0.1"], TERM="xterm-256color", NO_COLOR="1", COLUMNS="120")
    assert b"\x1b[34m" not in shown and b"\x1b[33m" not in shown and b"\x1b[32m" not in shown


def test_top_ends_with_3_when_the_broker_goes(control: Control) -> None:
    started = subprocess.Popen(
        [*TEM, "top", "--interval", "0.1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not control.call(lambda: control.server._tasks):
        time.sleep(0.02)
    time.sleep(0.3)
    control.close()
    _, said = started.communicate(timeout=20)
    assert started.returncode == 3
    assert "closed the connection" in said
