"""The process's own arena on each CUDA device."""

from __future__ import annotations

import threading

from torch_elastic_mem.arena import Arena
from torch_elastic_mem.device import cuda_index

_lock = threading.Lock()
_arenas: dict[int, Arena] = {}  # guarded by the lock


def default_arena(device: str = "cuda") -> Arena:
    """The arena that `torch_allocator` draws on where it is given a priority. Thread-safe.

    Opened when first asked for, with all the memory that is free on the device then, and never closed.
    Further tenants of this process open their accounts on it.

    Args:
        device: "cuda" or "cuda:N".

    Raises:
        InvalidArgument: it is the name of no CUDA device. DriverMissing: there is no such device, or no
            driver that can serve it. InUseError: another arena is open on the device.
    """
    index = cuda_index(device)
    with _lock:
        if index not in _arenas:
            _arenas[index] = Arena(f"cuda:{index}")
        return _arenas[index]
