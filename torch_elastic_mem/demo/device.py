"""Where the demo runs: the backend, torch's settings for equal bits, and the arena with its two accounts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import torch_elastic_mem as tem
from torch_elastic_mem.demo.model import initial_weights
from torch_elastic_mem.demo.phase import Stage
from torch_elastic_mem.demo.scale import default_capacity, scale_for
from torch_elastic_mem.demo.text import Text

_SEED = 20
_WARM = 256 << 20  # free bytes that a GPU's arena keeps ready to be mapped


def choose_backend(backend: str) -> str:
    """Turns "auto" into "cuda" where torch can use a GPU, else into "host"."""
    if backend == "auto":
        return "cuda" if torch.cuda.is_available() else "host"
    return backend


@contextmanager
def equal_bits(backend: str) -> Iterator[None]:
    """Makes torch give the same bits for the same work, with a core for each tenant, while it lasts."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    interval = sys.getswitchinterval()
    torch.set_num_threads(1)
    # A tenant that launches one small kernel after the other would else hold the GIL for 5 ms at a time.
    sys.setswitchinterval(5e-4)
    if backend != "host":
        # cuBLAS reads this when it makes its first handle.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        if backend != "host" and workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
        elif workspace is not None:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


def open_stage(backend: str, capacity: int | None) -> Stage:
    """Opens the arena and the accounts "training" and "serving", and draws the first weights.

    Raises:
        InvalidArgument: The capacity does not suit the demo, or torch has already allocated on the GPU.
    """
    host = backend == "host"
    if not host and torch.cuda.is_initialized():
        raise tem.InvalidArgument(
            "the demo was asked to run on CUDA in a process whose torch already allocates there, and its "
            "allocator can no longer be changed: run `tem demo` as a process of its own"
        )
    if host:
        capacity = default_capacity(backend, 0) if capacity is None else capacity
        scale = scale_for(backend, capacity)
        arena = tem.Arena(backend, capacity=capacity)
    else:
        # Nothing else is to grow on the device, so all of the capacity may be leased.
        arena = tem.Arena(backend, reserve=(0, _WARM))
        try:
            capacity = default_capacity(backend, arena.snapshot().free) if capacity is None else capacity
            scale = scale_for(backend, capacity)
            arena.set_capacity(capacity)
        except BaseException:
            arena.close()
            raise
    training = arena.account("training", "training")
    serving = arena.account("serving", "serving")
    if not host:
        # Autograd runs backward on threads of its own, outside any scope: what they allocate is training's.
        torch.cuda.memory.change_current_allocator(tem.torch_allocator(arena.device, training))
    return Stage(arena, training, serving, scale, initial_weights(scale.shape, _SEED), Text())


def close_stage(stage: Stage) -> int:
    """Closes the accounts and then the arena; returns the bytes that had not come back in between."""
    if stage.arena.backend == "cuda":
        torch.cuda.synchronize()
        # Each thread's cuBLAS handle keeps a workspace from torch's allocator.
        torch._C._cuda_clearCublasWorkspaces()
    stage.serving.close()
    stage.training.close()
    stage.arena.collect()
    left = stage.arena.snapshot()
    stage.arena.close()
    return left.leased + left.limbo + left.created - left.spare
