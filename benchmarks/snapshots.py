"""Allocation traces out of torch's memory snapshots: what was allocated and freed, and what torch reserved.

A snapshot is what `torch.cuda.memory._dump_snapshot` writes after `_record_memory_history`. A block counts as
freed when torch could use it again (free_completed), which is later than it was asked to be freed where other
streams used it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec


class SnapshotError(ValueError):
    """A file that is no snapshot with a history, or one that cannot be replayed; says why."""


class Step(msgspec.Struct, frozen=True, array_like=True):
    """Block number `block` is allocated, with its bytes and its stream; or freed, if bytes are 0."""

    block: int
    nbytes: int = 0
    stream: int = 0


class Trace(msgspec.Struct):
    """What a process allocated on one device, and what its own allocator needed for it.

    Attributes:
        steps: in order. The first `before` of them make what lived before the recording.
        blocks: how many there are.
        pairs: blocks that were freed again.
        streams: all that were allocated for.
        peak_allocated: most bytes that were live at once, as asked for.
        native_peak: most bytes that torch's allocator reserved.
    """

    steps: list[Step]
    before: int
    blocks: int
    pairs: int
    streams: list[int]
    peak_allocated: int
    native_peak: int


class _Plain(pickle.Unpickler):
    """Loads lists, dicts and numbers, which is all that a snapshot is made of."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def read(path: Path) -> Trace:
    """Reads the trace of the device with the longest history.

    Raises:
        SnapshotError: the file is no snapshot, or nothing was recorded.
    """
    try:
        with path.open("rb") as file:
            snapshot = _Plain(file).load()
        histories = snapshot["device_traces"]
        history = max(histories, key=len)
        device = histories.index(history)
        segments = [one for one in snapshot["segments"] if one.get("device", device) == device]
        found = parse(history, segments)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"{path.name} is no memory snapshot with a history: {error}") from error
    return found


def parse(history: Sequence[Mapping[str, Any]], segments: Sequence[Mapping[str, Any]]) -> Trace:
    """The trace of a history, given what was reserved at its end.

    Raises:
        ValueError: it holds no allocation.
    """
    before: list[Step] = []
    steps: list[Step] = []
    live: dict[int, Step] = {}
    reserved = lowest = highest = 0
    number = 0
    pairs = 0
    for event in history:
        action, size = event["action"], event["size"]
        if action == "alloc":
            step = Step(number, max(size, 1), event["stream"])
            number += 1
            live[event["addr"]] = step
            steps.append(step)
        elif action == "free_completed":
            known = live.pop(event["addr"], None)
            if known is None:
                known = Step(number, max(size, 1), event["stream"])
                number += 1
                before.append(known)
            steps.append(Step(known.block))
            pairs += 1
        elif action in ("segment_alloc", "segment_map"):
            reserved += size
        elif action in ("segment_free", "segment_unmap"):
            reserved -= size
        highest, lowest = max(highest, reserved), min(lowest, reserved)
    if not steps:
        raise ValueError("it records no allocation")
    for segment in segments:
        before += _older(segment, live, number + len(before))
    blocks = sum(1 for step in [*before, *steps] if step.nbytes)
    renumbered = _renumbered(before, steps)
    # What was reserved at the end tells what was reserved at the start.
    start = sum(segment["total_size"] for segment in segments) - reserved
    return Trace(
        renumbered,
        len(before),
        blocks,
        pairs,
        sorted({step.stream for step in renumbered if step.nbytes}),
        _peak(renumbered),
        max(start, -lowest) + highest,
    )


def _older(segment: Mapping[str, Any], live: Mapping[int, Step], number: int) -> list[Step]:
    """Blocks that live at the end, and that the history does not tell of."""
    found: list[Step] = []
    address = segment["address"]
    for block in segment["blocks"]:
        at = block.get("address", address)
        address = at + block["size"]
        if block["state"] == "active_allocated" and at not in live:
            nbytes = block.get("requested_size") or block["size"]
            found.append(Step(number + len(found), nbytes, segment["stream"]))
    return found


def _renumbered(before: Sequence[Step], steps: Sequence[Step]) -> list[Step]:
    """All steps with block numbers that have no gaps, in the order in which blocks are allocated."""
    numbers: dict[int, int] = {}
    out = []
    for step in [*before, *steps]:
        if step.nbytes:
            numbers[step.block] = len(numbers)
        out.append(Step(numbers[step.block], step.nbytes, step.stream))
    return out


def _peak(steps: Sequence[Step]) -> int:
    sizes: dict[int, int] = {}
    now = most = 0
    for step in steps:
        if step.nbytes:
            sizes[step.block] = step.nbytes
            now += step.nbytes
            most = max(most, now)
        else:
            now -= sizes.pop(step.block)
    return most
