"""Timing: interleaved rounds, so that what is compared ran in the same minute on the same machine."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec

from benchmarks.terminal import progress

DRAWS = 1000


class Summary(msgspec.Struct, frozen=True):
    """Median and quartiles of one series of readings, in the unit of the readings."""

    median: float
    q1: float
    q3: float
    n: int


def summarise(values: Sequence[float]) -> Summary:
    """Median and quartiles of at least one reading."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, q1, q3, len(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; 0.0 when there are no readings."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Summary:
    """Ratio of two interleaved series, round by round: drift of the machine hits both sides of a pair."""
    return summarise([a / b for a, b in zip(numerators, denominators, strict=True)])


def tail_ratio(numerators: Sequence[float], denominators: Sequence[float], percent: float) -> Summary:
    """Ratio of two series' percentiles, and the quartiles of what other draws of as many readings would give.

    A p99 is the value of a few readings. The quartiles are a bootstrap's: of the ratios of both series drawn
    anew from themselves (B. Efron, "Bootstrap Methods", 1979).
    """
    rng = random.Random(0)
    drawn = [
        percentile(rng.choices(numerators, k=len(numerators)), percent)
        / percentile(rng.choices(denominators, k=len(denominators)), percent)
        for _ in range(DRAWS)
    ]
    q1, _, q3 = statistics.quantiles(drawn, n=4)
    ratio = percentile(numerators, percent) / percentile(denominators, percent)
    return Summary(ratio, q1, q3, min(len(numerators), len(denominators)))


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside a timed region, as timeit does."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def elapsed_ns(call: Callable[[], object]) -> int:
    """Wall time of one call, in nanoseconds."""
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start


def interleave(
    cases: Mapping[str, Callable[[], float]], rounds: int, *, label: str, warmup: int = 2
) -> dict[str, list[float]]:
    """Runs every case once a round, in order: A B A B, never A A B B.

    Args:
        cases: name to a function that does one step and returns its reading (nanoseconds). A case may undo
            what an earlier one did, since the order within a round is the order of the mapping.
        rounds: readings to keep of each case.
        label: what the progress display calls this.
        warmup: rounds run first and not kept.

    Returns:
        The readings of each case, `rounds` of them, in the order they were taken.
    """
    readings: dict[str, list[float]] = {name: [] for name in cases}
    with progress(label, warmup + rounds) as advance, collector_paused():
        for number in range(warmup + rounds):
            for name, case in cases.items():
                reading = case()
                if number >= warmup:
                    readings[name].append(reading)
            advance(1)
    return readings
