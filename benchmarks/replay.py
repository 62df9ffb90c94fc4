"""Replays a trace of allocations against the core of an account."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import torch_elastic_mem as tem
from benchmarks.snapshots import Step, Trace
from benchmarks.timing import collector_paused
from torch_elastic_mem import _C


class Streams:
    """A stream of the backend for each stream of a trace; 0 stays 0."""

    def __init__(self, backend: str, device: str, streams: Sequence[int]) -> None:
        self._host = backend == "host"
        self._kept: list[Any] = []
        self.of: dict[int, int] = {}
        for stream in streams:
            self.of[stream] = 0 if stream == 0 else self._new(device)

    def _new(self, device: str) -> int:
        if self._host:
            self._kept.append(_C.host_stream_create())
            return int(self._kept[-1])
        self._kept.append(torch.cuda.Stream(device))
        return int(self._kept[-1].cuda_stream)

    def close(self) -> None:
        """Lets go of them."""
        for stream in self._kept if self._host else []:
            _C.host_stream_destroy(stream)


def replay(arena: tem.Arena, trace: Trace) -> dict[str, Any]:
    """Replays a trace from an empty cache, and once more with the cache it left.

    Raises:
        tem.OutOfMemory: the arena is smaller than what the trace needs.
    """
    streams = Streams(arena.backend, arena.device, trace.streams)
    with arena.account("replay") as account:
        core = account.allocator()
        first = _pass(core, trace, streams.of)
        # Growth goes ahead of what is asked by a little, and that counts.
        reserved = core.stats()["reserved_bytes"]["all"]["peak"]
        again = _pass(core, trace, streams.of)
        stats = core.stats()
    streams.close()
    return {
        "reserved": reserved,
        "reserved_again": stats["reserved_bytes"]["all"]["peak"],
        "extents": stats["maps"],
        "first_ns": first,
        "again_ns": again,
    }


def _pass(core: _C.Allocator, trace: Trace, streams: Mapping[int, int]) -> int:
    """One run over all steps; nanoseconds. What lives at the end is freed after that."""
    before = _prepared(trace.steps[: trace.before], streams)
    steps = _prepared(trace.steps[trace.before :], streams)
    addresses = [0] * trace.blocks
    _run(core, before, addresses)
    with collector_paused():
        start = time.perf_counter_ns()
        _run(core, steps, addresses)
        spent = time.perf_counter_ns() - start
    for address in addresses:
        if address:
            core.free(address)
    return spent


def _prepared(steps: Sequence[Step], streams: Mapping[int, int]) -> list[tuple[int, int, int]]:
    return [(step.block, step.nbytes, streams[step.stream] if step.nbytes else 0) for step in steps]


def _run(core: _C.Allocator, steps: Sequence[tuple[int, int, int]], addresses: list[int]) -> None:
    allocate, free = core.allocate, core.free
    for block, nbytes, stream in steps:
        if nbytes:
            addresses[block] = allocate(nbytes, stream)
        else:
            free(addresses[block])
            addresses[block] = 0
