"""Installs torch's CPU allocator over the arena."""

from __future__ import annotations

import threading
from types import ModuleType

import torch

from torch_elastic_mem import _C
from torch_elastic_mem.errors import TemError

_cpu_lock = threading.Lock()
_cpu_installed = False


def _torch_extension() -> ModuleType:
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
            f"the torch extension was built for torch {built}, and this is torch {running}; install the "
            "package again with 'pip install --no-build-isolation --force-reinstall --no-deps'"
        )
    extension: ModuleType = _torch
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
