"""The tables of bench_kv: what each cache held for the same requests, and what its calls cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch_elastic_mem as tem
from benchmarks.kv_runs import KvRun
from benchmarks.results import Table

MICROSECOND = 1000
MILLISECOND = 1_000_000


def tables(title: str, runs: Sequence[KvRun]) -> list[Table]:
    """Memory held by each cache, then the cost of the calls of those that were really driven."""
    return [_memory(title, runs), _calls([run for run in runs if run.calls])]


def _memory(title: str, runs: Sequence[KvRun]) -> Table:
    live = runs[0].figures
    rows = [
        [
            run.name,
            _size(run.figures.mean_mapped),
            _size(run.figures.peak_mapped),
            _size(run.figures.peak_excess),
            f"{run.figures.fragmentation:.3f}",
            f"{run.figures.fragmentation_p95:.3f}",
            f"{run.delayed} / {run.preempted} / {run.rejected}",
        ]
        for run in runs
    ]
    whole = live.peak_live / live.mean_live
    rows.append(
        [
            "all mapped once, sized for the peak",
            _size(live.peak_live),
            _size(live.peak_live),
            "",
            f"{whole:.3f}",
            "",
            "",
        ]
    )
    return Table(
        title,
        [
            "cache",
            "mean mapped",
            "peak mapped",
            "most beyond live",
            "fragmentation",
            "p95",
            "delayed / preempted / rejected",
        ],
        rows,
        f"Live: {_size(live.mean_live)} on average, {_size(live.peak_live)} at the peak, over "
        f"{runs[0].simulated_s:.0f} simulated seconds. Fragmentation: byte-seconds mapped over byte-seconds "
        "live; p95: what mapped over live exceeds in 5% of the time in which anything is live.",
    )


def _calls(runs: Sequence[KvRun]) -> Table:
    rows = []
    for run in runs:
        allocate, free, compact = run.calls["allocate"], run.calls["free"], run.calls["compact"]
        rows.append(
            [
                run.name,
                f"{allocate.p50 / MICROSECOND:.0f} / {allocate.p99 / MICROSECOND:.0f} us",
                f"{free.p50 / MICROSECOND:.0f} / {free.p99 / MICROSECOND:.0f} us",
                f"{compact.p50 / MICROSECOND:.0f} / {compact.p99 / MICROSECOND:.0f} us"
                if compact.count
                else "",
                f"{(allocate.total + free.total + compact.total) / MILLISECOND:.0f} ms",
                _size(run.copied_bytes) if compact.count else "",
            ]
        )
    return Table(
        "Wall time of the calls",
        ["cache", "allocate p50 / p99", "free p50 / p99", "compact p50 / p99", "all calls", "copied"],
        rows,
        "One allocate is a whole prompt or one more block of a running request; one free is a whole request.",
    )


def _size(nbytes: float) -> str:
    return tem.format_bytes(round(nbytes))
