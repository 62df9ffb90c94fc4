"""Where torch's allocations come from: the CPU allocator of the host backend and the plain C hooks on CUDA."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any

import torch

from torch_elastic_mem import _C
from torch_elastic_mem.arena import Account
from torch_elastic_mem.errors import DriverMissing, InvalidArgument, InUseError, OutOfMemory, TemError

if TYPE_CHECKING:
    import types

_cpu_lock = threading.Lock()
_cpu_installed = False


def _torch_extension() -> types.ModuleType:
    try:
        from torch_elastic_mem import _torch
    except ImportError as error:
        raise TemError(
            f"the torch extension cannot be loaded ({error}); install the package where torch is, with "
            "'pip install --no-build-isolation', so that it is built for it"
        ) from error
    built, running = _torch.TORCH_VERSION, ".".join(torch.__version__.split(".")[:2])
    if built != running:
        raise TemError(
            f"the torch extension was built for torch {built}, and this is torch {running}; install the package again "
            "with 'pip install --no-build-isolation --force-reinstall --no-deps'"
        )
    extension: types.ModuleType = _torch
    return extension


def install_cpu_allocator() -> None:
    """Makes torch's CPU allocator ask the thread's account first. Once a process; thread-safe.

    Outside of every account's scope allocations go where they went before.

    Raises:
        TemError: the torch extension was not built, or was built for another torch.
    """
    global _cpu_installed
    with _cpu_lock:
        if _cpu_installed:
            return
        _torch_extension().install_cpu_allocator(_C.host_api())
        _cpu_installed = True


class PluggableAllocator:
    """What `torch.cuda.memory.change_current_allocator` takes. Made by `torch_allocator`."""

    def __init__(self, account: Account) -> None:
        plug = torch.cuda.memory.CUDAPluggableAllocator(_C.__file__, "tem_cuda_alloc", "tem_cuda_free")
        hooks = ctypes.CDLL(_C.__file__)
        # Left unset, record_stream does nothing and memory that another stream still reads is handed out again.
        record = ctypes.cast(hooks.tem_cuda_record_stream, ctypes.c_void_p).value
        plug.allocator().set_record_stream_fn(record)
        self._plug = plug
        self.account = account

    def allocator(self) -> Any:
        """torch's handle of the hooks."""
        return self._plug.allocator()


# torch keeps the hooks for the life of the process.
_installed: dict[str, PluggableAllocator] = {}


def torch_allocator(device: str, account: Account) -> Any:
    """An allocator for `torch.cuda.memory.change_current_allocator` that draws on an account.

    These are torch's plain C hooks: `torch.cuda.memory_stats`, snapshots, graph capture and IPC raise, as with every
    pluggable allocator. Give it to torch before CUDA is initialised:

        torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", account))

    Args:
        device: "cuda" or "cuda:N", the device of the account's arena.
        account: charged where no `account.allocations()` scope is active, on every thread.

    Raises:
        InvalidArgument: the account is on another device. DriverMissing: this torch has no CUDA.
        InUseError: CUDA is initialised already, so torch would refuse.
    """
    arena = account.arena
    wanted = f"{device}:0" if device == "cuda" else device
    if arena.backend != "cuda" or wanted != arena.device:
        raise InvalidArgument(f"the account {account.name!r} is on {arena.device}, not on {device!r}")
    if torch.version.cuda is None:
        raise DriverMissing("this torch is built without CUDA; install a CUDA build")
    if torch.cuda.is_initialized() and arena.device not in _installed:
        raise InUseError("torch has initialised CUDA already; call torch_allocator before the first CUDA tensor")
    _C.set_device_default(int(arena.device.partition(":")[2]), account.allocator())
    if arena.device not in _installed:
        _installed[arena.device] = PluggableAllocator(account)
    return _installed[arena.device]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is not to be had, by whichever way torch passed it on."""
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | MemoryError) and "torch_elastic_mem: account" in str(error)
