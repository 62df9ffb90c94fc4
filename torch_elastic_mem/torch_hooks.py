"""Torch's plain C hooks over accounts, for a torch that `_torch_cuda` was not built for."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from torch_elastic_mem import _C
from torch_elastic_mem.errors import OutOfMemory

MISSING = (
    "statistics (torch.cuda.memory_stats, memory_allocated and their like), snapshots, memory history, CUDA "
    "graph capture, torch.cuda.MemPool and CUDA IPC"
)


def plain_hooks() -> Any:
    """An allocator as torch's C++ knows it, of three C functions. What `MISSING` names raises with it."""
    plug = torch.cuda.memory.CUDAPluggableAllocator(
        _C.__file__, "tem_cuda_alloc", "tem_cuda_free"
    ).allocator()
    hooks = ctypes.CDLL(_C.__file__)
    # Left unset, record_stream does nothing and memory that another stream still reads is handed out again.
    plug.set_record_stream_fn(ctypes.cast(hooks.tem_cuda_record_stream, ctypes.c_void_p).value)
    return plug


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is not to be had, by whichever way torch passed it on."""
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | MemoryError) and "torch_elastic_mem: out of memory" in str(error)
