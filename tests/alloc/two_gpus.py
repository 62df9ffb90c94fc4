"""Runs over two GPUs whose every bit must be the same whichever allocator torch has.

`python -m tests.alloc.two_gpus peers MODE` is one process with both. `... rank MODE RANK PORT` is one of two,
each with a GPU of its own, that talk by NCCL. MODE is "native", or "ours": on accounts, while an account of a
higher class takes and gives back, from other threads, memory that training has. A workload prints a line of
JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
os.environ["NCCL_SOCKET_IFNAME"] = "lo"
os.environ["NCCL_NVLS_ENABLE"] = "0"

import torch
import torch.distributed as dist

import torch_elastic_mem as tem
from tests.alloc.real_models import digest, mlp, seed, train
from tests.alloc.rival import CAPACITY, Rival

MiB = 1 << 20
Tensors = list[torch.Tensor]


def copies_both_ways() -> Tensors:
    found = []
    for step in range(20):
        there = torch.randn(MiB + step * 1000, device="cuda:0")
        back = (there.to("cuda:1") * 2).to("cuda:0", non_blocking=True)
        found.append(back.sum())
        # What is freed at once, beside a copy that may still read it.
        del there, back
    return found


def kernels_that_read_and_write_the_others_memory() -> Tensors:
    """A copy that changes the layout is a kernel which reaches across, where peers may."""
    found = []
    for step in range(8):
        source = torch.randn(1024, 2048 + 32 * step, device="cuda:0")
        target = torch.empty(source.shape[::-1], device="cuda:1")
        target.copy_(source.t())
        back = torch.empty_like(source)
        back.copy_(target.t())
        found += [(back - source).abs().max(), target.sum().to("cuda:0")]
    return found


def memory_that_was_mapped_after_the_first_copy() -> Tensors:
    torch.cuda.empty_cache()
    large = torch.arange(256 * MiB // 4, device="cuda:1", dtype=torch.int32).view(8192, -1)
    moved = torch.empty(large.shape[::-1], device="cuda:0", dtype=torch.int32)
    moved.copy_(large.t())
    return [moved.sum(), moved[:, ::7].sum()]


def batches(rank: int, steps: int, *shape: int) -> Iterator[torch.Tensor]:
    for step in range(steps):
        yield torch.randn(shape[0] - step % 3, *shape[1:], device="cuda") + rank


def sums_of_tensors_that_are_let_go_of_at_once() -> Tensors:
    found = []
    for step in range(60):
        sent = torch.randn(1 << 18, device="cuda") * (dist.get_rank() + 1) + step
        gathered = torch.empty(2 << 18, device="cuda")
        gathering = dist.all_gather_into_tensor(gathered, sent.clone(), async_op=True)
        summing = dist.all_reduce(sent, async_op=True)
        gathering.wait()
        summing.wait()
        found.append(sent.mean() + gathered.mean())
        del sent, gathered, gathering, summing
    return found


def data_in_parallel() -> Tensors:
    model = mlp(512).cuda()
    parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0], bucket_cap_mb=1)
    losses, trained = train(model, parallel, batches(dist.get_rank(), 12, 512, 512))
    return [*losses, *trained]


def parameters_in_shards() -> Tensors:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mlp(512, 6).cuda()
    mesh = init_device_mesh("cuda", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses, trained = train(model, model, batches(dist.get_rank(), 12, 1024, 512))
    return [*losses, *(each.full_tensor() for each in trained)]  # type: ignore[attr-defined]


def sums_in_registered_buffers() -> Tensors:
    """NCCL maps what it registers; its memory must stay where it is while the pool lives."""
    backend: Any = dist.group.WORLD._get_backend(torch.device("cuda"))  # type: ignore[union-attr]
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        kept = torch.randn(8 * MiB, device="cuda")
    backend.register_mem_pool(pool)
    found = []
    for step in range(20):
        kept.mul_(0.5).add_(step)
        dist.all_reduce(kept)
        found.append(kept.mean())
    torch.cuda.synchronize()
    backend.deregister_mem_pool(pool)
    return found


PEERS = (
    copies_both_ways,
    kernels_that_read_and_write_the_others_memory,
    memory_that_was_mapped_after_the_first_copy,
)
RANKS = (
    sums_of_tensors_that_are_let_go_of_at_once,
    data_in_parallel,
    parameters_in_shards,
    sums_in_registered_buffers,
)


def tell(workloads: tuple[Callable[[], Tensors], ...], first: int) -> None:
    for workload in workloads:
        seed(first)
        line: dict[str, Any] = {"workload": workload.__name__}
        try:
            found = [each.detach().clone() for each in workload()]
            torch.cuda.synchronize()
            assert all(bool(each.isfinite().all()) for each in found)
            line["bits"] = digest(found)
        except Exception:  # noqa: BLE001
            line["failure"] = traceback.format_exc()
        print(json.dumps(line), flush=True)


def main() -> None:
    part, mode = sys.argv[1:3]
    if part == "rank":
        os.environ["CUDA_VISIBLE_DEVICES"] = sys.argv[3]
    torch.use_deterministic_algorithms(True, warn_only=True)
    arenas: list[tem.Arena] = []
    if mode == "ours":
        for device in ("cuda:0", "cuda:1") if part == "peers" else ("cuda:0",):
            arenas.append(tem.Arena(device, capacity=CAPACITY))
            account = arenas[-1].account("training", priority="training")
            allocator = tem.torch_allocator(device, account)
            if len(arenas) == 1:
                torch.cuda.memory.change_current_allocator(allocator)
    torch.cuda.init()
    rival = Rival(arenas[0].account("serving", priority="serving")) if arenas else None
    if part == "peers":
        assert torch.cuda.can_device_access_peer(0, 1)
        tell(PEERS, 0)
    else:
        rank, port = int(sys.argv[3]), sys.argv[4]
        at = f"tcp://127.0.0.1:{port}"
        dist.init_process_group(
            "nccl", init_method=at, rank=rank, world_size=2, device_id=torch.device("cuda:0")
        )
        tell(RANKS, rank)
        dist.destroy_process_group()
    if rival is not None:
        rival.stop()
        print(json.dumps({"workload": "rival", "failure": rival.failure, "bursts": rival.bursts}), flush=True)


if __name__ == "__main__":
    main()
