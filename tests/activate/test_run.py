"""`tem run` as a command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.activate.conftest import TEM
from torch_elastic_mem.cli.run import STARTUP, with_startup


def tem_run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TEM, "run", *arguments], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(autouse=True)
def shell(environment: dict[str, str]) -> None:
    """Every test runs in it."""


def test_the_command_takes_the_place_of_tem() -> None:
    started = subprocess.Popen(
        [*TEM, "run", "sh", "-c", "echo $$ $TEM_ENABLE $TEM_PRIORITY"], stdout=subprocess.PIPE, text=True
    )
    assert started.communicate()[0] == f"{started.pid} 1 training\n"


def test_its_exit_code_and_its_signal_are_ours() -> None:
    assert tem_run("--", "sh", "-c", "exit 7").returncode == 7
    assert tem_run("--", "sh", "-c", "kill -TERM $$").returncode == -signal.SIGTERM


def test_signals_arrive_as_they_would_without_us() -> None:
    # `yes` ends by SIGPIPE, which Python ignores.
    started = subprocess.Popen([*TEM, "run", "yes"], stdout=subprocess.PIPE)
    assert started.stdout is not None
    started.stdout.read(10)
    started.stdout.close()
    assert started.wait(30) == -signal.SIGPIPE


def test_options_of_the_command_are_the_commands() -> None:
    done = tem_run("echo", "--priority", "x", "--help", "--", "-n")
    assert done.stdout == "--priority x --help -- -n\n"


def test_input_is_passed_on() -> None:
    done = subprocess.run([*TEM, "run", "cat"], input="hello", capture_output=True, text=True)
    assert done.stdout == "hello"


def test_no_such_command_is_127_and_no_program_is_126(tmp_path: Path) -> None:
    done = tem_run("--", "no-such-command", "x")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == "tem run: no-such-command: No such file or directory\n"
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    done = tem_run("--", str(plain))
    assert (done.returncode, done.stderr) == (126, f"tem run: {plain}: Permission denied\n")


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        ([], {}, "Missing argument 'COMMAND...'"),
        (["--"], {}, "Missing argument 'COMMAND...'"),
        (["--prio", "x", "true"], {}, "No such option"),
        (["--priority", "urgent", "true"], {}, "tem: TEM_PRIORITY: no priority class 'urgent'"),
        (["--device", "cpu", "true"], {}, "tem: TEM_DEVICE: 'cpu' is no CUDA device"),
        (["--max", "4XB", "true"], {}, "tem: TEM_MAX: '4XB' is not a size"),
        (["--max", "1GiB", "true"], {"TEM_MIN": "2GiB"}, "tem: TEM_MIN=2GiB, TEM_MAX=1GiB: "),
        (["true"], {"TEM_ENABLE": "yes"}, "tem: TEM_ENABLE is 'yes'"),
        (["true"], {"TEM_PRIORITY": "urgent"}, "tem: TEM_PRIORITY: no priority class 'urgent'"),
    ],
)
def test_bad_input_runs_nothing(arguments: list[str], variables: dict[str, str], said: str) -> None:
    done = tem_run(*arguments, **variables)
    assert done.returncode == 2
    assert said in done.stderr


def test_options_go_over_their_variables() -> None:
    options = ["--name", "a", "--max", "2GiB", "--weight", "3"]
    done = tem_run(
        *options, "sh", "-c", "echo $TEM_NAME $TEM_MAX $TEM_HIGH $TEM_WEIGHT", TEM_NAME="b", TEM_HIGH="1GiB"
    )
    assert done.stdout == "a 2GiB 1GiB 3\n"


def test_switched_off_it_changes_nothing() -> None:
    done = tem_run("sh", "-c", "echo $PYTHONPATH $TEM_PRIORITY", TEM_ENABLE="0")
    assert done.stdout == f"{os.environ['PYTHONPATH']}\n"


def test_a_python_path_stays_behind_ours() -> None:
    assert with_startup("") == str(STARTUP)
    assert with_startup("/a:/b") == f"{STARTUP}:/a:/b"
    assert with_startup(with_startup("/a:")) == f"{STARTUP}:/a:"  # an empty entry is the current folder
    assert [path.name for path in STARTUP.glob("*.py")] == ["sitecustomize.py"]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from torch_elastic_mem.cli import main\n"
        "main(['run', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'rich', 'torch_elastic_mem._C', 'torch_elastic_mem.torch_cuda'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tem run -- python train.py" in done.stdout
