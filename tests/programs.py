"""Tests that run as programs of their own, since torch takes one CUDA allocator a process."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def decorated(file: Path, name: str) -> list[str]:
    """The functions of a file that have a decorator of that name, without importing it."""
    return [
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(each).split("(")[0] == name for each in node.decorator_list)
    ]


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | variables,
    )


def end(
    started: subprocess.Popen[str], given: str = "", timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """What a program said. One that takes too long is stopped, and says what it did until then."""
    try:
        out, err = started.communicate(given, timeout=timeout)
    except subprocess.TimeoutExpired:
        started.kill()
        out, err = started.communicate()
        err += f"\nstopped after {timeout} s"
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def program(*arguments: str, given: str = "", timeout: float = 180) -> subprocess.CompletedProcess[str]:
    return end(start(*arguments), given, timeout)


def report(checks: Iterable[Callable[[], None]], settle: Callable[[], None]) -> None:
    """In such a program: runs each check, then `settle`, and prints a line for `reports`."""
    for check in checks:
        failure = ""
        try:
            check()
            settle()
        except Exception:  # noqa: BLE001  (the line says what it was)
            failure = traceback.format_exc()
        print(json.dumps({"check": check.__name__, "failure": failure}), flush=True)


def reports(done: subprocess.CompletedProcess[str], key: str) -> dict[str, dict[str, object]]:
    """The lines of JSON that a program printed, by their first key."""
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(f'{{"{key}"')]
    return {line[key]: line for line in lines}
