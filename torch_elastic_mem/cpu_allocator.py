"""Installs torch's CPU allocator over the arena."""

from __future__ import annotations

import threading

from torch_elastic_mem import _C
from torch_elastic_mem.extension import torch_extension

_cpu_lock = threading.Lock()
_cpu_installed = False


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
        torch_extension("_torch").install_cpu_allocator(_C.host_api())
        _cpu_installed = True
