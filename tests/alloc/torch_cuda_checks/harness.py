"""What all groups use."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
CAPACITY = 8 * GiB
SIZES = (
    1,
    511,
    512,
    513,
    4 * KiB,
    100_000,
    MiB - 1,
    MiB,
    MiB + 1,
    3 * MiB,
    10 * MiB,
    20 * MiB + 1,
    100 * MiB,
)
# Cycles of a kernel that is still running when the host has gone on: a quarter of a second and more.
LONG = 500_000_000

Check = Callable[[], None]
CHECKS: list[Check] = []
native: dict[str, Any] = {}
# torch's own tests reach for these as well: no public function is as exact.
private: Any = torch._C


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def tensor(size: int, stream: torch.cuda.Stream | None = None) -> torch.Tensor:
    with torch.cuda.stream(stream):
        return torch.empty(size, dtype=torch.uint8, device="cuda")


def stat(key: str) -> int:
    value: int = torch.cuda.memory_stats()[key]
    return value


def clean() -> None:
    """Nothing is left but what lives."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def pools() -> set[tuple[int, int]]:
    """The pools that hold memory."""
    return {tuple(each["segment_pool_id"]) for each in torch.cuda.memory_snapshot()}


def holds(segments: list[dict[str, Any]], held: torch.Tensor) -> bool:
    address = held.data_ptr()
    return any(each["address"] <= address < each["address"] + each["total_size"] for each in segments)


@contextmanager
def raises(kind: type[BaseException], *words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in {error}"
    else:
        raise AssertionError(f"no {kind.__name__}")


@contextmanager
def recording(**options: Any) -> Iterator[None]:
    torch.cuda.memory._record_memory_history(**options)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def graph_of(work: Callable[[], Any], pool: Any = None, **options: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, **options):
        result = work()
    return graph, result
