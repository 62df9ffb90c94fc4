"""torch's CUDA allocator over an account: what torch's own answers, ours answers too."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.programs import decorated, program, reports
from tests.rungs import Rung

pytestmark = [pytest.mark.rungs("cuda"), pytest.mark.timeout(600)]

PACKAGE = "tests.alloc.torch_cuda_checks"
CHECKS = Path(__file__).with_name("torch_cuda_checks")

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


CHECKED = [
    (file.stem, check) for file in sorted(CHECKS.glob("[!_]*.py")) for check in decorated(file, "check")
]


def outcome(group: str, native: str) -> dict[str, str]:
    """What each check of a group said, and the end of its process."""
    done = program("-m", PACKAGE, group, given=native, timeout=120)
    said = {name: str(line["failure"]) for name, line in reports(done, "check").items()}
    return {**said, "": f"rc {done.returncode}\n{done.stderr}"}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[dict[str, str]]]]:
    """The groups that are wanted, some of which run at once: most of their time is the start of torch."""
    done = program("-m", PACKAGE, "native", timeout=120)
    assert done.returncode == 0, done.stderr
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    groups = {call.params["group"] for call in calls if call and "group" in call.params}
    with ThreadPoolExecutor(4) as workers:
        yield {group: workers.submit(outcome, group, done.stdout) for group in sorted(groups)}


@pytest.mark.parametrize(("group", "check"), CHECKED)
def test_torch_over_an_account(
    rung: Rung, outcomes: dict[str, Future[dict[str, str]]], group: str, check: str
) -> None:
    said = outcomes[group].result()
    failure = said.get(check, "the process ended before it")
    assert not failure, f"{failure}\n{said['']}"
    assert said[""].startswith("rc 0\n"), said[""]


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_in_silence(rung: Rung, end: str) -> None:
    done = program("-c", IMPORTS + ENDS[end])
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
