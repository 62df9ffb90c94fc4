"""NCCL's registered buffers. With one rank it looks at the allocator as with many."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .harness import MiB, check, holds, tensor


@contextmanager
def one_rank() -> Iterator[Any]:
    device = torch.device("cuda:0")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        yield dist.group.WORLD._get_backend(device)  # type: ignore[union-attr]
    finally:
        dist.destroy_process_group()


@check
def nccl_registers_what_is_in_a_pool() -> None:
    with one_rank() as backend:
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            kept = torch.ones(8 * MiB, device="cuda")
            others = [tensor(size * MiB) for size in (1, 30, 64)]
        backend.register_mem_pool(pool)
        dist.all_reduce(kept)
        torch.cuda.empty_cache()
        segments = pool.snapshot()
        assert all(holds(segments, each) for each in (kept, *others))
        assert bool((kept == 1).all())
        backend.deregister_mem_pool(pool)
        del kept, others, pool
        gc.collect()
