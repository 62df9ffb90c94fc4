"""Runs of bench_kv: the same requests served out of each cache, summed up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Literal

import msgspec
import torch

import torch_elastic_mem as tem
from benchmarks import machine
from benchmarks.caches import CompoundPages, ElasticCache
from benchmarks.residency import Curve, Figures
from benchmarks.serving import BLOCK_TOKENS, Cache, Engine
from benchmarks.terminal import progress
from benchmarks.timing import percentile
from benchmarks.traces import Request

# Llama-3.1-8B: 32 layers, 8 KV heads of 128, keys and values in bfloat16. 16 tokens are 2 MiB.
LAYERS = 32
BLOCK_SHAPE = (2, BLOCK_TOKENS, 8, 128)
BLOCK_BYTES_PER_LAYER = 2 * BLOCK_TOKENS * 8 * 128 * 2

Layout = Literal["block", "layer"]


class Calls(msgspec.Struct, frozen=True):
    """What one kind of call cost, in nanoseconds of wall time."""

    count: int
    total: int
    p50: float
    p99: float


class KvRun(msgspec.Struct):
    """One cache served one trace."""

    name: str
    figures: Figures
    curve: Curve
    finished: int
    rejected: int
    preempted: int
    delayed: int
    simulated_s: float
    wall_s: float
    calls: dict[str, Calls] = {}
    copied_bytes: int = 0
    refused: int = 0
    snapshot: dict[str, int] = {}


class Model(msgspec.Struct, frozen=True):
    """The cache to build: Llama-3.1-8B's, with its layers divided by `scale` where memory is short."""

    scale: int
    capacity: int

    @property
    def layers(self) -> int:
        """Layers of the cache."""
        return LAYERS // self.scale

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all its layers."""
        return BLOCK_BYTES_PER_LAYER * self.layers


def serve(cache: Cache, requests: Sequence[Request], name: str, compact_every_s: float | None) -> KvRun:
    """Serves `requests` out of `cache` and sums the run up."""
    start = time.perf_counter()
    with progress(name, len(requests)) as advance:
        outcome = Engine(cache, compact_every_s=compact_every_s).serve(requests, advance)
    return KvRun(
        name=name,
        figures=outcome.residency.figures(),
        curve=outcome.residency.curve(),
        finished=outcome.finished,
        rejected=outcome.rejected,
        preempted=outcome.preempted,
        delayed=outcome.delayed,
        simulated_s=outcome.seconds,
        wall_s=time.perf_counter() - start,
    )


def serve_elastic(
    arena: tem.Arena,
    model: Model,
    layout: Layout,
    requests: Sequence[Request],
    compact_every_s: float | None,
    max_copies: int,
) -> KvRun:
    """Serves `requests` out of an ElasticKVTensor of its own, and closes it."""
    name = f"elastic, layout {layout}" + (", compaction" if compact_every_s is not None else "")
    blocks = model.capacity // model.block_bytes
    with (
        arena.account("kv", priority="serving") as account,
        closing(
            tem.ElasticKVTensor(
                account, blocks, BLOCK_SHAPE, torch.bfloat16, layers=model.layers, layout=layout
            )
        ) as kv,
    ):
        cache = ElasticCache(kv, max_copies=max_copies)
        run = serve(cache, requests, name, compact_every_s)
        run.calls = {
            "allocate": _calls(cache.allocate_ns),
            "free": _calls(cache.free_ns),
            "compact": _calls(cache.compact_ns),
        }
        run.copied_bytes = cache.copied_blocks * model.block_bytes
        run.refused = cache.refused
        snapshot = arena.snapshot()
        run.snapshot = {"created": snapshot.created, "spare": snapshot.spare, "limbo": snapshot.limbo}
    return run


def _calls(nanoseconds: Sequence[int]) -> Calls:
    return Calls(len(nanoseconds), sum(nanoseconds), percentile(nanoseconds, 50), percentile(nanoseconds, 99))


def serve_all(
    backend: str,
    model: Model,
    requests: Sequence[Request],
    compact_every_s: float,
    max_copies: int,
) -> tuple[list[KvRun], dict[str, str]]:
    """Serves one trace out of every cache: both layouts, with and without compaction, and fixed pages.

    Returns:
        The runs, and the facts of the machine.

    Raises:
        tem.TemError: the device is missing, or smaller than the capacity asked.
    """
    runs = []
    with tem.Arena(backend, capacity=model.capacity) as arena:
        for layout in ("block", "layer"):
            for every in (None, compact_every_s):
                runs.append(serve_elastic(arena, model, layout, requests, every, max_copies))
        facts = machine.facts(gpu_uuid=None if arena.backend == "host" else arena.uuid)
    fixed = CompoundPages(model.capacity, model.block_bytes, model.layers)
    runs.append(serve(fixed, requests, "fixed compound pages (a model)", None))
    return runs, facts
