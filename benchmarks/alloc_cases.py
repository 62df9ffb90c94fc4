"""What bench_alloc times, the same for every contender, in nanoseconds a pair."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable

import msgspec
import torch

from benchmarks.alloc_loop import Loop
from benchmarks.timing import collector_paused

KIB = 1 << 10
MIB = 1 << 20
SIZES = {"512 B": 512, "1 MiB": MIB, "64 MiB": 64 * MIB}
PYTHON_SIZES = {"64 B": 64, "1 MiB": MIB, "64 MiB": 64 * MIB}
THREADS = (1, 4)
LIVE = 200
SEED = 20
# A reading from Python is the median of so many: a machine that others use stands still for milliseconds.
BATCHES = 25


class Effort(msgspec.Struct, frozen=True):
    """How much is timed in one reading."""

    pairs: int = 20_000
    python_pairs: int = 5_000
    mixed_steps: int = 20_000


def pattern(steps: int, seed: int = SEED) -> tuple[list[int], list[int]]:
    """Sizes and slots of a mixed load: log-uniform from 512 B to 64 MiB, in any of 200 slots."""
    rng = random.Random(seed)
    low, high = math.log(512), math.log(64 * MIB)
    sizes = [int(math.exp(rng.uniform(low, high))) for _ in range(steps)]
    return sizes, [rng.randrange(LIVE) for _ in range(steps)]


def name_of(size: str, threads: int) -> str:
    """A case of a size and a number of threads."""
    return f"{size}, {threads} thread" + ("s" if threads > 1 else "")


def fixed_sizes(pairs: Callable[[int, int, int], float], effort: Effort) -> dict[str, float]:
    """Every size with every number of threads; `pairs` takes bytes, pairs and threads."""
    return {
        name_of(size, threads): pairs(nbytes, effort.pairs, threads)
        for size, nbytes in SIZES.items()
        for threads in THREADS
    }


def mixed(loop: Loop, effort: Effort) -> float:
    """A step of the mixed load."""
    return loop.mixed(*pattern(effort.mixed_steps))


def from_python(device: torch.device, effort: Effort) -> dict[str, float]:
    """`torch.empty`, and its free when the tensor is dropped."""
    found = {}
    with collector_paused():
        for name, nbytes in PYTHON_SIZES.items():
            batch = effort.python_pairs // BATCHES + 1
            readings = [_batch(nbytes, device, batch) for _ in range(1 + BATCHES)]
            found[name] = statistics.median(readings[1:])
    return found


def _batch(nbytes: int, device: torch.device, pairs: int) -> float:
    empty = torch.empty
    start = time.perf_counter_ns()
    for _ in range(pairs):
        empty(nbytes, dtype=torch.uint8, device=device)
    return (time.perf_counter_ns() - start) / pairs
