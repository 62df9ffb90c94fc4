"""What happens when a program under `tem run` has imported torch."""

from __future__ import annotations

import os

from torch_elastic_mem.activate.settings import Settings


def install() -> None:
    """Makes the process's allocator torch's, with an account as the environment says.

    The account is opened when torch initialises CUDA. Until then no driver is touched: most processes that
    import torch, such as the workers of a data loader, never use CUDA, and others fork first. A torch without
    CUDA is left alone.

    Raises:
        TemError: it cannot be done; torch is as it was.
    """
    import torch

    settings = Settings.read(os.environ)
    if torch.version.cuda is None:
        return
    from torch_elastic_mem.torch_cuda import process_allocator

    allocator = process_allocator(hooks=False)
    torch.cuda.memory.change_current_allocator(allocator)
    limits = settings.priority_class()

    def serve() -> None:
        for index in settings.indices(os.environ, torch.cuda.device_count()):
            # The program may have given torch an account of its own meanwhile.
            if not allocator.serves(index):
                allocator.want(index, limits, settings.name or limits.name)
                allocator.account(f"cuda:{index}")

    torch.cuda._lazy_call(serve)
