"""The extensions that are built against one version of torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from torch_elastic_mem.errors import TemError


def torch_extension(name: str) -> ModuleType:
    """Loads the extension of that name, if it was built for the torch that runs. Thread-safe.

    Raises:
        TemError: it was not built, or was built for another torch; the message says what builds it.
    """
    try:
        extension = import_module(f"torch_elastic_mem.{name}")
    except ImportError as error:
        raise TemError(
            f"the torch extension {name} cannot be loaded ({error}); install the package where torch is, "
            "with 'pip install --no-build-isolation', so that it is built for it"
        ) from error
    built, running = extension.TORCH_VERSION, ".".join(torch.__version__.split(".")[:2])
    if built != running:
        raise TemError(
            f"the torch extension {name} was built for torch {built}, and this is torch {running}; install "
            "the package again with 'pip install --no-build-isolation --force-reinstall --no-deps'"
        )
    return extension
