"""CUDA allocations of torch from an account, through the plain C hooks."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from torch_elastic_mem import _C
from torch_elastic_mem.account import Account
from torch_elastic_mem.errors import DriverMissing, InUseError, InvalidArgument, OutOfMemory


class PluggableAllocator:
    """What `torch.cuda.memory.change_current_allocator` takes. Made by `torch_allocator`."""

    def __init__(self, account: Account) -> None:
        plug = torch.cuda.memory.CUDAPluggableAllocator(_C.__file__, "tem_cuda_alloc", "tem_cuda_free")
        hooks = ctypes.CDLL(_C.__file__)
        # Left unset, record_stream does nothing and memory that another stream still reads is handed out
        # again.
        record = ctypes.cast(hooks.tem_cuda_record_stream, ctypes.c_void_p).value
        plug.allocator().set_record_stream_fn(record)
        self._plug = plug
        self.account = account

    def allocator(self) -> Any:
        """What torch knows the hooks by."""
        return self._plug.allocator()


# torch keeps the hooks for the life of the process.
_installed: dict[str, PluggableAllocator] = {}


def torch_allocator(device: str, account: Account) -> Any:
    """An allocator for `torch.cuda.memory.change_current_allocator` that draws on an account.

    These are torch's plain C hooks: `torch.cuda.memory_stats`, snapshots, graph capture and IPC raise, as
    with every pluggable allocator. Give it to torch before CUDA is initialised:

        torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", account))

    Args:
        device: "cuda" or "cuda:N", the device of the account's arena.
        account: charged where no `account.allocations()` scope is active, on every thread.

    Raises:
        InvalidArgument: the account is on another device. DriverMissing: this torch has no CUDA.
        InUseError: CUDA is initialised already, so torch would refuse.
    """
    own = account.device
    wanted = f"{device}:0" if device == "cuda" else device
    if own.backend != "cuda" or wanted != own.name:
        raise InvalidArgument(f"the account {account.name!r} is on {own.name}, not on {device!r}")
    if torch.version.cuda is None:
        raise DriverMissing("this torch is built without CUDA; install a CUDA build")
    if torch.cuda.is_initialized() and own.name not in _installed:
        raise InUseError(
            "torch has initialised CUDA already; call torch_allocator before the first CUDA tensor"
        )
    _C.set_device_default(own.index, account.allocator())
    if own.name not in _installed:
        _installed[own.name] = PluggableAllocator(account)
    return _installed[own.name]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is not to be had, by whichever way torch passed it on."""
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | MemoryError) and "torch_elastic_mem: out of memory" in str(error)
