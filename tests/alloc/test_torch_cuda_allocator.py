"""torch's CUDA allocator over an account: what torch's own answers, ours answers too."""

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
CHECKS = Path(__file__).with_name("torch_cuda_checks.py")

IMPORTS = """
import threading
import torch
import torch_elastic_mem as tem
arena = tem.Arena("cuda", capacity="2GiB")
account = arena.account("training")
torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", account))
"""
# How a process may end. None of them says a word.
ENDS = {
    "tensors alive": "x = torch.ones(1 << 20, device='cuda'); torch.kept = torch.ones(9, device='cuda')",
    "the arena's name gone first": "x = torch.ones(1 << 20, device='cuda'); del arena, account",
    "a graph alive": (
        "x = torch.ones(1 << 20, device='cuda')\n"
        "g = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(g): y = x * 2\n"
        "g.replay()"
    ),
    "a pool alive": (
        "pool = torch.cuda.MemPool()\n"
        "with torch.cuda.use_mem_pool(pool): x = torch.ones(1 << 20, device='cuda')"
    ),
    "recording": "torch.cuda.memory._record_memory_history(); x = torch.ones(1 << 20, device='cuda')",
    "a block that waits for a stream": (
        "side = torch.cuda.Stream(); x = torch.ones(1 << 20, device='cuda')\n"
        "with torch.cuda.stream(side): torch.cuda._sleep(1 << 30)\n"
        "x.record_stream(side); del x"
    ),
    "made in a thread that ended": (
        "box = []\n"
        "t = threading.Thread(target=lambda: box.append(torch.ones(1000, device='cuda')))\n"
        "t.start(); t.join()"
    ),
    "a child of fork()": (
        "import os, warnings; warnings.simplefilter('ignore')\nx = torch.ones(1 << 20, device='cuda')\n"
        "if os.fork() == 0:\n    del x; os._exit(0)\n"
        "assert os.wait()[1] == 0; assert x.sum().item() == 1 << 20"
    ),
}


def checks() -> list[tuple[str, str]]:
    """Group and name of each check, without importing torch."""
    found = []
    for node in ast.parse(CHECKS.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            for each in node.decorator_list:
                if isinstance(each, ast.Call) and ast.unparse(each.func) == "group":
                    found.append((ast.literal_eval(each.args[0]), node.name))
    return found


def program(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], input=given, capture_output=True, text=True, cwd=ROOT, timeout=540
    )


@pytest.fixture(scope="module")
def native() -> str:
    done = program(str(CHECKS), "native")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outcomes(native: str) -> dict[str, dict[str, str]]:
    """What each group's process printed; filled as groups are asked for."""
    return {"native": {"": native}}


@pytest.mark.parametrize(("group", "check"), checks())
def test_torch_over_an_account(
    rung: Rung, outcomes: dict[str, dict[str, str]], group: str, check: str
) -> None:
    if group not in outcomes:
        done = program(str(CHECKS), group, given=outcomes["native"][""])
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
        outcomes[group] = {line["check"]: line["failure"] for line in lines}
        outcomes[group]["the end of the process"] = f"rc {done.returncode}\n{done.stderr}"
    ended = outcomes[group]["the end of the process"]
    failure = outcomes[group].get(check, f"the process ended before it: {ended}")
    assert not failure, f"{failure}\n{ended}"
    assert ended.startswith("rc 0\n"), ended


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_in_silence(rung: Rung, end: str) -> None:
    done = program("-c", IMPORTS + ENDS[end])
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
