"""Tensors of accounts between processes, by torch.multiprocessing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rungs import Rung

pytestmark = [pytest.mark.rungs("cuda"), pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKS = Path(__file__).with_name("torch_cuda_ipc_checks.py")


def checks() -> list[str]:
    """The name of each check, without importing torch."""
    return [
        node.name
        for node in ast.parse(CHECKS.read_text()).body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "check" for d in node.decorator_list)
    ]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.alloc.torch_cuda_ipc_checks"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=540,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    return {line["check"]: line["failure"] for line in lines} | {"": f"rc {done.returncode}\n{done.stderr}"}


@pytest.mark.parametrize("check", checks())
def test_torch_multiprocessing(rung: Rung, outcomes: dict[str, str], check: str) -> None:
    failure = outcomes.get(check, f"the process ended before it: {outcomes['']}")
    assert not failure, f"{failure}\n{outcomes['']}"


def test_the_program_ends_well(rung: Rung, outcomes: dict[str, str]) -> None:
    assert outcomes[""].startswith("rc 0\n"), outcomes[""]
