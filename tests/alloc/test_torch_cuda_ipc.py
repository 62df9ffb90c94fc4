"""Tensors of accounts between processes, by torch.multiprocessing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import decorated, program, reports
from tests.rungs import Rung

pytestmark = [pytest.mark.rungs("cuda"), pytest.mark.timeout(600)]

CHECKS = Path(__file__).with_name("torch_cuda_ipc_checks.py")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    done = program("-m", "tests.alloc.torch_cuda_ipc_checks", timeout=540)
    found = {check: str(line["failure"]) for check, line in reports(done, "check").items()}
    return found | {"": f"rc {done.returncode}\n{done.stderr}"}


@pytest.mark.parametrize("check", decorated(CHECKS, "check"))
def test_torch_multiprocessing(rung: Rung, outcomes: dict[str, str], check: str) -> None:
    failure = outcomes.get(check, f"the process ended before it: {outcomes['']}")
    assert not failure, f"{failure}\n{outcomes['']}"


def test_the_program_ends_well(rung: Rung, outcomes: dict[str, str]) -> None:
    assert outcomes[""].startswith("rc 0\n"), outcomes[""]
