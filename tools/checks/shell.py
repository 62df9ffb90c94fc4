"""Running programs for a step: quiet while they succeed, and their last words when they fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "check"
PYTHON = sys.executable
LAST_WORDS = 200  # lines: a sanitizer's report with the interpreter's frames is long


class _Way(threading.local):
    """How a thread runs programs: the words before theirs."""

    def __init__(self) -> None:
        self.before: list[str] = []


_way = _Way()
_running: set[subprocess.Popen[str]] = set()
_ended = threading.Event()


class Failed(Exception):
    """A step found something wrong; the text is what a person needs to see."""


class Skipped(Exception):
    """A step cannot be done here, or was not asked for; the text is why."""


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    """Runs a program in the repository's root and returns its standard output.

    Args:
        command: the program and its arguments.
        env: variables to set on top of this process's.

    Raises:
        Failed: it ended with another code than 0. The text has the command and the end of both its streams.
    """
    if _ended.is_set():
        raise Failed("ended because another step has failed")
    words = [*_way.before, *(str(word) for word in command)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
        process_group=0,
    ) as program:
        _running.add(program)
        if _ended.is_set():
            end_programs()
        try:
            out, err = program.communicate()
        except BaseException:
            os.killpg(program.pid, signal.SIGKILL)
            raise
        finally:
            _running.discard(program)
    if program.returncode:
        lines = (out + err).splitlines()[-LAST_WORDS:]
        raise Failed("\n".join([f"exit code {program.returncode} from: {' '.join(words)}", *lines]))
    return out


def give_way() -> None:
    """Programs that this thread runs from now on have what those of others leave."""
    _way.before = ["nice", "-n", "19"]


def end_programs() -> None:
    """Ends those that run, and what they have started; none begins any more."""
    _ended.set()
    for program in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)


def tool(name: str) -> Path:
    """The program `name` beside this interpreter or, where packages of the system are in use, on PATH."""
    beside = Path(PYTHON).with_name(name)
    found = beside if beside.exists() else shutil.which(name)
    if not found:
        raise Failed(f"there is no {name}: run `make venv`")
    return Path(found)


def pytest(*arguments: str | Path, env: Mapping[str, str] | None = None) -> str:
    """Runs pytest and returns its closing line."""
    return closing_line(run(PYTHON, "-m", "pytest", *arguments, env=env))


def closing_line(output: str) -> str:
    """The last line that pytest printed: how many tests passed."""
    return next(line for line in reversed(output.splitlines()) if " passed" in line)


def seconds(*command: str | Path) -> float:
    """The shortest of five runs of a program."""

    def once() -> float:
        started = time.perf_counter()
        run(*command)
        return time.perf_counter() - started

    return min(once() for _ in range(5))
