"""One arena of elastic GPU memory for several tenants: addresses stay, memory comes and goes beneath them.

    import torch_elastic_mem as tem

    arena = tem.Arena("host", capacity="4GiB")
    training = arena.account("training", "training")
    serving = arena.account("serving", "serving")

Importing the package loads values only. What needs the compiled core, or torch, is loaded when it is first
named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from torch_elastic_mem.errors import (
    AdmissionError,
    BlockError,
    BrokerError,
    ClosedError,
    DriverError,
    DriverMissing,
    ForkedError,
    InUseError,
    InvalidArgument,
    NotResident,
    OutOfMemory,
    TemError,
)

# `priority` names a module and a function. Python binds a module to its package when it is first loaded: the
# function is bound here, after that, and stays.
from torch_elastic_mem.priority import PriorityClass, priority
from torch_elastic_mem.units import format_bytes, parse_bytes
from torch_elastic_mem.version import VERSION

if TYPE_CHECKING:
    from torch_elastic_mem.account import Account, Group, Reservation
    from torch_elastic_mem.arena import Arena
    from torch_elastic_mem.block_pool import BlockPool, Compaction
    from torch_elastic_mem.defaults import default_arena
    from torch_elastic_mem.elastic_kv import ElasticKVTensor
    from torch_elastic_mem.shared import SharedWeights, attach, share
    from torch_elastic_mem.snapshot import AccountSnapshot, Snapshot, YieldRecord
    from torch_elastic_mem.torch_cuda import TorchAllocator, torch_allocator
    from torch_elastic_mem.torch_hooks import is_out_of_memory

__version__ = VERSION

_LAZY = {
    "Account": "account",
    "AccountSnapshot": "snapshot",
    "Arena": "arena",
    "BlockPool": "block_pool",
    "Compaction": "block_pool",
    "ElasticKVTensor": "elastic_kv",
    "Group": "account",
    "Reservation": "account",
    "SharedWeights": "shared",
    "Snapshot": "snapshot",
    "TorchAllocator": "torch_cuda",
    "YieldRecord": "snapshot",
    "attach": "shared",
    "default_arena": "defaults",
    "is_out_of_memory": "torch_hooks",
    "share": "shared",
    "torch_allocator": "torch_cuda",
}

__all__ = [
    "Account",
    "AccountSnapshot",
    "AdmissionError",
    "Arena",
    "BlockError",
    "BlockPool",
    "BrokerError",
    "ClosedError",
    "Compaction",
    "DriverError",
    "DriverMissing",
    "ElasticKVTensor",
    "ForkedError",
    "Group",
    "InUseError",
    "InvalidArgument",
    "NotResident",
    "OutOfMemory",
    "PriorityClass",
    "Reservation",
    "SharedWeights",
    "Snapshot",
    "TemError",
    "TorchAllocator",
    "YieldRecord",
    "attach",
    "default_arena",
    "format_bytes",
    "is_out_of_memory",
    "parse_bytes",
    "priority",
    "share",
    "torch_allocator",
]


# Type checkers read the imports above; with this in sight they would let any name pass.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Loads what is not a plain value when it is first asked for (PEP 562)."""
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
