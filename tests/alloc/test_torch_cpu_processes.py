"""Tensors of an account at the end of a process and in its children: each case in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torch_elastic_mem as tem

IMPORTS = """
import gc, os, sys, threading
import torch
import torch_elastic_mem as tem
"""
OPEN = """
arena = tem.Arena("host", capacity="64MiB")
account = arena.account("training")
"""
# How a process may end with tensors alive. None of them says a word.
ENDS = {
    "globals of the main module": "with account.allocations(): x = torch.ones(1 << 20)",
    "the scope still open": "scope = account.allocations(); scope.__enter__(); x = torch.ones(1000)",
    "the arena's name gone first": (
        "with account.allocations(): x = torch.ones(1000)\ndel arena, account; gc.collect()"
    ),
    "a cycle with the arena": (
        "class Box: pass\nbox = Box(); box.me = box; box.arena = arena; box.account = account\n"
        "with account.allocations(): box.x = torch.ones(1000)\ndel box, arena, account"
    ),
    "kept by torch": (
        "with account.allocations(): torch.kept = torch.ones(1000)\ntorch.nn.kept = arena; del arena, account"
    ),
    "kept by modules": "with account.allocations(): sys.kept = torch.ones(9); tem.kept = torch.ones(1000)",
    "with a cache": (
        "kv = tem.ElasticKVTensor(account, 8, (1 << 20,), torch.uint8)\n"
        "kv.ensure(range(4)); view = kv.tensor[2]\n"
        "pool = tem.BlockPool(kv); plan = pool.plan_compaction()"
    ),
    "with the arena's thread": (
        "arena.set_reserve('4MiB', '16MiB')\nwith account.allocations(): x = torch.ones(1 << 20)"
    ),
    "with a reclaimer": "handle = account.on_reclaim(lambda n, t: None); x = torch.ones(3)",
    "made in a thread that ended": (
        "box = []\ndef make():\n    with account.allocations(): box.append(torch.ones(1000))\n"
        "t = threading.Thread(target=make); t.start(); t.join()"
    ),
    "a daemon thread in a wait": (
        "import time\n"
        "threading.Thread(target=account.wait, args=(1 << 40, 60), daemon=True).start(); time.sleep(0.1)"
    ),
    "an exit in the scope": "with account.allocations():\n    x = torch.ones(1000); sys.exit(0)",
    "autograd's threads and parameters": (
        "with account.allocations():\n    m = torch.nn.Linear(64, 64); m(torch.ones(2, 64)).sum().backward()"
    ),
    "a destructor that looks at its tensor": (
        "class Late:\n    def __del__(self): assert float(self.x.sum()) == 1000; self.x = self.x + 1\n"
        "late = Late()\nwith account.allocations(): late.x = torch.ones(1000)"
    ),
}
FORKS = {
    "a fork in the scope allocates outside of the arena": """
with account.allocations():
    x = torch.ones(1000)
    if (child := os.fork()) == 0:
        y = torch.ones(2000) + 1
        del x  # whose memory the child has not: it only must not free it
        os._exit(0 if float(y[0]) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
assert float(x.sum()) == 1000 and account.held > 0
""",
    "a fork ends as any process": """
with account.allocations():
    x = torch.ones(1000)
    kv = tem.ElasticKVTensor(account, 8, (1 << 20,), torch.uint8)
    kv.ensure([1])
    if (child := os.fork()) == 0:
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
kv.tensor[1].fill_(3)
assert float(x.sum()) == 1000 and int(kv.tensor[1, 5]) == 3
""",
    "an arena is refused in a fork": """
if (child := os.fork()) == 0:
    for call in (account.trim, arena.snapshot, lambda: arena.account("b"), account.close):
        try:
            call()
        except tem.ForkedError:
            continue
        os._exit(1)
    other = tem.Arena("host", capacity="8MiB")
    with other.account("mine") as mine, mine.allocations():
        float(torch.ones(1000).sum())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""",
    "a pool of processes": """
import multiprocessing
def work(n): return float(torch.ones(n).sum())
if __name__ == "__main__":
    with account.allocations(), multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(work, [10, 20]) == [10, 20]
""",
}


LOADER = """
from torch.utils.data import DataLoader, TensorDataset
def main():
    data = TensorDataset(torch.arange(64.0).view(32, 2))  # outside: forked workers have no arena to read from
    with account.allocations():
        for context in ("fork", "spawn"):
            loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context=context)
            total = sum(float(batch.sum()) for (batch,) in loader)
            assert total == 2016, total
if __name__ == "__main__":
    main()
"""
# Importing torch takes seconds: one process does, and each case is a child of it that ends as Python ends.
NURSERY = """
import json
for name, source in json.loads(sys.stdin.read()).items():
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(writer, 2)
        os.close(reader), os.close(writer)
        exec(compile(source, name, "exec"))
        break
    os.close(writer)
    with os.fdopen(reader) as words:
        said = words.read()
    print(json.dumps([name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]), flush=True)
"""


def python(script: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    paths = [str(Path(tem.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, script], input=stdin, capture_output=True, text=True, timeout=100, env=env
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and standard error of every case."""
    script = tmp_path_factory.mktemp("nursery") / "nursery.py"
    script.write_text(IMPORTS + NURSERY)
    done = python(str(script), json.dumps({name: OPEN + source for name, source in (ENDS | FORKS).items()}))
    assert (done.returncode, done.stderr) == (0, "")
    return {name: (code, said) for name, code, said in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", ENDS)
def test_a_process_ends_in_silence_with_live_tensors(outcomes: dict[str, tuple[int, str]], name: str) -> None:
    assert outcomes[name] == (0, "")


@pytest.mark.parametrize("name", FORKS)
def test_children_do_not_crash(outcomes: dict[str, tuple[int, str]], name: str) -> None:
    assert outcomes[name] == (0, "")


def test_the_workers_of_a_data_loader_do_not_crash(tmp_path: Path) -> None:
    script = tmp_path / "case.py"
    script.write_text(IMPORTS + OPEN + LOADER)
    done = python(str(script))
    assert (done.returncode, done.stderr) == (0, "")
