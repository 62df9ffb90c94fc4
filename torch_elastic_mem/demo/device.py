"""Where the demo runs: the backend, torch's settings for equal bits, and what is opened there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import torch_elastic_mem as tem
from torch_elastic_mem import _C
from torch_elastic_mem.arena import LIBCUDA
from torch_elastic_mem.demo.model import initial_weights
from torch_elastic_mem.demo.pair import Setting
from torch_elastic_mem.demo.scale import default_capacity, scale_for
from torch_elastic_mem.demo.stage import Stage
from torch_elastic_mem.demo.text import Text
from torch_elastic_mem.device import device_of

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


def measure(backend: str) -> tuple[str, int]:
    """What a broker calls the device, and the bytes that are free there, which on the host nobody asks."""
    kind, index = device_of(backend)
    if kind == "host":
        return "HOST", 0
    device = _C.cuda_backend(index, LIBCUDA)
    return device.uuid, device.memory_info()[0]


def setting_for(backend: str, capacity: int | None, free: int, seconds: float) -> Setting:
    """Chooses what suits a device with so many free bytes.

    Raises:
        InvalidArgument: The capacity does not suit the demo.
    """
    capacity = default_capacity(backend, free) if capacity is None else capacity
    return Setting(backend, capacity, scale_for(backend, capacity), seconds)


def open_arena(setting: Setting, broker: str | None = None) -> tem.Arena:
    """Opens an arena that stands alone, or one under a broker.

    Raises:
        InvalidArgument: Torch has already allocated on the GPU.
    """
    if setting.backend != "host" and torch.cuda.is_initialized():
        raise tem.InvalidArgument(
            "the demo was asked to run on CUDA in a process whose torch already allocates there, and its "
            "allocator can no longer be changed: run `tem demo` as a process of its own"
        )
    # Nothing else is to grow on the device, so all of the capacity may be leased.
    reserve = None if broker or setting.backend == "host" else (0, _WARM)
    return tem.Arena(setting.backend, capacity=setting.capacity, reserve=reserve, broker=broker)


def open_stage(arena: tem.Arena, name: str, setting: Setting) -> Stage:
    """Opens an account of the class that it is named after, and draws the first weights."""
    account = arena.account(name, name)
    return Stage(arena, account, setting.scale, initial_weights(setting.scale.shape, _SEED), Text())


def give_torch(account: tem.Account) -> None:
    """On a GPU, charges to an account what torch allocates outside of any scope.

    Autograd runs backward on threads of its own, which have none.
    """
    if account.device.backend == "cuda":
        torch.cuda.memory.change_current_allocator(tem.torch_allocator(account.device.name, account))


def close_arena(arena: tem.Arena) -> int:
    """Closes an arena without accounts; returns the bytes that had not come back."""
    arena.collect()
    left = arena.snapshot()
    arena.close()
    return left.leased + left.limbo + left.created - left.spare
