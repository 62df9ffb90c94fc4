"""What must be the same whichever allocator torch has."""

from __future__ import annotations

from typing import Any

import torch

from .harness import SIZES, MiB, raises, recording, tensor

FIGURES = ("allocation", "active", "allocated_bytes", "active_bytes", "requested_bytes")
ACTIONS = ("alloc", "free_requested", "free_completed", "oom", "snapshot")


def answers() -> dict[str, Any]:
    return {
        "keys": sorted(torch.cuda.memory_stats()),
        "nested": shape_of(torch.cuda.memory_stats_as_nested_dict()),
        "allocated": allocated_by_size(),
        "sums": sums_by_size(),
        "snapshot": snapshot_keys(),
    }


def allocated_by_size() -> list[int]:
    growth = []
    for size in SIZES:
        before = torch.cuda.memory_allocated()
        held = tensor(size)
        growth.append(torch.cuda.memory_allocated() - before)
        del held
    return growth


def sums_by_size() -> dict[str, int]:
    """What one block of each size adds to the sums that are kept by size."""
    torch.cuda.reset_accumulated_memory_stats()
    allocated_by_size()
    stats = torch.cuda.memory_stats()
    return {
        key: stats[key]
        for figure in FIGURES
        for pool in ("all", "small_pool", "large_pool")
        for key in (f"{figure}.{pool}.allocated", f"{figure}.{pool}.freed")
    }


def shape_of(value: Any) -> Any:
    return {key: shape_of(value[key]) for key in sorted(value)} if isinstance(value, dict) else None


def snapshot_keys() -> dict[str, Any]:
    """The keys of a snapshot, of its parts, and of each kind of entry in its trace."""
    with recording(stacks="python"):
        held = tensor(3 * MiB)
        tensor(5 * MiB)
        with raises(torch.OutOfMemoryError):
            tensor(1 << 50)
        torch.cuda.memory._snapshot()
        snapshot = torch.cuda.memory._snapshot()
        del held
    blocks = [block for each in snapshot["segments"] for block in each["blocks"]]
    trace = snapshot["device_traces"][0]
    return {
        "snapshot": sorted(snapshot),
        "segments": sorted(set().union(*snapshot["segments"])),
        "blocks": sorted(set().union(*blocks)),
        "states": sorted({block["state"] for block in blocks}),
        "settings": sorted(snapshot["allocator_settings"]),
        "trace": {
            action: sorted(set().union(*(entry for entry in trace if entry["action"] == action)))
            for action in ACTIONS
        },
    }
