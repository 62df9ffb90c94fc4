"""Torch's allocators that are compared: its own, by default and with expandable segments, and an account."""

from __future__ import annotations

import os
from contextlib import ExitStack

import torch

import torch_elastic_mem as tem
from torch_elastic_mem.device import device_of

NATIVE = "native"
EXPANDABLE = "expandable"
OURS = "ours"
ON_CUDA = [NATIVE, EXPANDABLE, OURS]
ON_HOST = [NATIVE, OURS]

HOST_CAPACITY = 1 << 30


def names(backend: str) -> list[str]:
    """The contenders of a backend; on the host `native` is torch's CPU allocator."""
    return ON_HOST if device_of(backend)[0] == "host" else ON_CUDA


def environment(contender: str) -> dict[str, str]:
    """The environment of a contender's process."""
    chosen = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}
    variables = {name: value for name, value in os.environ.items() if name not in chosen}
    # cuBLAS reads it when it makes its first handle; without it equal work need not give equal bits.
    variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if contender == EXPANDABLE:
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return variables


class Stage:
    """A process whose torch allocates from one contender. Made once, before torch uses the device.

    Attributes:
        device: where tensors go.
        account: what is charged, if the contender is ours.
        arena: the account's.
    """

    def __init__(self, contender: str, backend: str) -> None:
        kind, index = device_of(backend)
        self.account: tem.Account | None = None
        self.arena: tem.Arena | None = None
        self._scope = ExitStack()
        if kind == "host":
            self.device = torch.device("cpu")
            torch.set_num_threads(1)
            if contender == OURS:
                self.arena = tem.Arena("host", capacity=HOST_CAPACITY)
                self.account = self.arena.account("training", "training")
                self._scope.enter_context(self.account.allocations())
            return
        self.device = torch.device("cuda", index)
        if contender == OURS:
            name = f"cuda:{index}"
            allocator = tem.torch_allocator(name, priority="training")
            torch.cuda.memory.change_current_allocator(allocator)
            torch.cuda.init()
            self.account = allocator.account(name)
            self.arena = tem.default_arena(name)
        torch.cuda.set_device(self.device)
        torch.cuda.synchronize()

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def uuid(self) -> str | None:
        """The GPU as `nvidia-smi` knows it; None on the host."""
        if not self.on_cuda:
            return None
        return "GPU-" + str(torch.cuda.get_device_properties(self.device).uuid).removeprefix("GPU-")

    def reset(self) -> None:
        """Gives cached memory back to the device, and starts new peaks."""
        if self.on_cuda:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif self.account is not None:
            self.account.allocator().empty_cache()
            self.account.allocator().reset_peak()

    def peaks(self) -> tuple[int, int]:
        """Most bytes reserved and most allocated since reset(); zeros where torch does not count."""
        if self.on_cuda:
            return torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        if self.account is None:
            return 0, 0
        stats = self.account.allocator().stats()
        return stats["reserved_bytes"]["all"]["peak"], stats["allocated_bytes"]["all"]["peak"]

    def retries(self) -> int:
        """How often the allocator emptied its cache to serve a request, so far."""
        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if self.on_cuda else 0
