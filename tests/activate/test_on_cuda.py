"""Whole programs on a GPU, with the two lines and under `tem run`: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest

from tests.activate.conftest import REPOSITORY, TEM, Program
from tests.rungs import CudaRung

pytestmark = [pytest.mark.rungs("cuda"), pytest.mark.gpu]

TRAIN = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
data = torch.randn(64, 256, device="cuda")
for _ in range(5):
    loss = (model(data) - data).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
print(loss.item().hex())
"""
TWO_LINES = """
import torch, torch_elastic_mem as tem
torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", priority="training"))
"""
# What a program sees of its account, without having opened one.
HELD = """
import torch_elastic_mem as tem
(account,) = tem.default_arena("cuda").snapshot().accounts
assert account.held > 0 and torch.cuda.memory_allocated() > 0, account
print(account.name, account.priority)
"""


@pytest.fixture
def run(program: Program, rung: CudaRung) -> Program:
    """`program` with the real torch."""
    return partial(program, PYTHONPATH=str(REPOSITORY))


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    assert "tem run" not in done.stderr and "Error" not in done.stderr, done.stderr
    return done.stdout.splitlines()


def test_training_computes_the_same_with_and_without(run: Program) -> None:
    native = lines(run(TRAIN, before=[]))
    assert lines(run(TWO_LINES + TRAIN + HELD, before=[])) == [*native, "training training"]
    assert lines(run(TRAIN + HELD)) == [*native, "training training"]
    assert lines(run(TRAIN + HELD, "--priority", "idle", "--name", "night")) == [*native, "night idle"]


def test_statistics_and_snapshots_are_there(run: Program) -> None:
    code = """
import torch
x = torch.ones(1 << 20, device="cuda")
assert torch.cuda.memory_allocated() == 4 << 20
assert torch.cuda.memory_stats()["allocation.all.current"] == 1
assert torch.cuda.memory.memory_snapshot()
del x
torch.cuda.empty_cache()
assert torch.cuda.memory_allocated() == 0
print(torch.cuda.max_memory_allocated())
"""
    assert lines(run(code)) == [str(4 << 20)]
    assert lines(run(TWO_LINES + code, before=[])) == [str(4 << 20)]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_the_workers_of_a_data_loader_never_touch_the_device(run: Program, context: str) -> None:
    code = f"""
import os, torch
from torch.utils.data import DataLoader, Dataset

class Numbers(Dataset):
    def __len__(self): return 32
    def __getitem__(self, index):
        opened = [os.readlink(f"/proc/self/fd/{{fd}}") for fd in os.listdir("/proc/self/fd")
                  if os.path.islink(f"/proc/self/fd/{{fd}}")]
        assert {context == "fork"} or not any("nvidia" in path for path in opened), opened
        return torch.tensor(float(index))

if __name__ == "__main__":
    total = torch.zeros((), device="cuda")
    workers = {{"num_workers": 2, "multiprocessing_context": {context!r}, "pin_memory": True}}
    for batch in DataLoader(Numbers(), 4, **workers):
        total += batch.to("cuda", non_blocking=True).sum()
    print(total.item())
"""
    assert lines(run(code)) == ["496.0"]


def test_a_parent_that_forks_before_it_uses_cuda(run: Program) -> None:
    code = """
import os, torch
assert not torch.cuda.is_initialized()
for _ in range(2):
    if (child := os.fork()) == 0:
        x = torch.ones(1000, device="cuda")
        assert x.sum().item() == 1000 and torch.cuda.memory_allocated()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
x = torch.ones(1000, device="cuda")
print(x.sum().item())
"""
    assert lines(run(code + HELD)) == ["1000.0", "training training"]
    assert lines(run(TWO_LINES + code + HELD, before=[])) == ["1000.0", "training training"]


def test_processes_that_torch_spawns(run: Program) -> None:
    code = """
import torch, torch.multiprocessing
def work(rank):
    import torch_elastic_mem as tem
    assert torch.ones(1000, device="cuda").sum().item() == 1000
    print(*[account.name for account in tem.default_arena().snapshot().accounts], flush=True)
if __name__ == "__main__":
    torch.multiprocessing.spawn(work, nprocs=2)
"""
    assert lines(run(code)) == ["training", "training"]


def test_a_worker_of_torchrun(run: Program) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--no-python"]
    done = run(TRAIN + HELD, before=[*TEM, "run", "--", sys.executable, *torchrun])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "training training"


ENDS = {
    "live tensors": "x = torch.ones(1 << 20, device='cuda')",
    "a cycle": "class Box: pass\nbox = Box(); box.me = box; box.x = torch.ones(9, device='cuda')",
    "kept by torch": "torch.kept = torch.ones(9, device='cuda')",
    "a kernel that runs": "x = torch.ones(8192, 8192, device='cuda')\nfor _ in range(50): x = x @ x * 1e-4",
    "a backward": "m = torch.nn.Linear(64, 64).cuda(); m(torch.ones(2, 64, device='cuda')).sum().backward()",
    "an exit": "x = torch.ones(9, device='cuda'); raise SystemExit(0)",
    "no use of CUDA": "x = torch.ones(9)",
}


@pytest.mark.parametrize("name", ENDS)
def test_a_process_ends_in_silence(run: Program, name: str) -> None:
    for before in (None, []):
        code = ("import torch\n" if before is None else TWO_LINES) + ENDS[name]
        done = run(code, before=before)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_out_of_memory_is_torch_s_and_the_program_goes_on(run: Program) -> None:
    code = """
import torch
try:
    torch.empty(1 << 50, device="cuda")
except torch.OutOfMemoryError as error:
    print("who holds" if "training" in str(error) else error)
print(torch.ones(1000, device="cuda").sum().item())
"""
    assert lines(run(code)) == ["who holds", "1000.0"]


def test_a_device_that_is_not_there_stops_the_program_with_a_reason(run: Program) -> None:
    done = run("import torch; torch.ones(9, device='cuda')", "--device", "cuda:77")
    assert done.returncode == 1
    assert "77" in done.stderr.splitlines()[-1] or "DriverMissing" in done.stderr


def test_without_the_extension_the_two_lines_warn_and_tem_run_leaves_torch_alone(run: Program) -> None:
    hide = "import sys; sys.modules['torch_elastic_mem._torch_cuda'] = None\n"
    done = run(hide + TWO_LINES + TRAIN, before=[])
    assert done.returncode == 0 and "plain C hooks" in done.stderr
    done = run(hide + TRAIN)
    assert done.returncode == 0 and "torch keeps its own memory" in done.stderr
