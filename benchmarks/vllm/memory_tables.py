"""The tables of bench_memory: what an engine held beside what was in use, and what it holds when idle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch_elastic_mem as tem
from benchmarks.results import TARGET_COLUMNS, Table, target_row
from benchmarks.vllm.memory_worker import Held


def tables(
    title: str, rows: Mapping[str, Held], kv_bytes: int, chunk: int, notes: Sequence[str]
) -> list[Table]:
    """All that was seen.

    Args:
        title: what was served, and where.
        rows: by how the engine was treated.
        kv_bytes: of the whole cache, which is what stock vLLM holds at all times.
        chunk: bytes that come and go together.
        notes: what failed.
    """
    return [_mapped(title, rows, kv_bytes, notes), _idle(rows, kv_bytes, chunk)]


def _mapped(title: str, rows: Mapping[str, Held], kv_bytes: int, notes: Sequence[str]) -> Table:
    columns = [
        "engine",
        "in use, mean / peak",
        "cached beside it, mean",
        "mapped, mean / peak",
        "mapped over in use",
        "p95",
        "over in use and cached",
        "preempted",
        "blocks moved",
    ]
    shown = [
        [
            name,
            f"{_size(held.used.mean_live)} / {_size(held.used.peak_live)}",
            _size(held.kept.mean_live - held.used.mean_live),
            f"{_size(held.used.mean_mapped)} / {_size(held.used.peak_mapped)}",
            f"{held.used.fragmentation:.3f}",
            f"{held.used.fragmentation_p95:.3f}",
            f"{held.kept.fragmentation:.3f}",
            str(held.preempted),
            str(held.moved),
        ]
        for name, held in rows.items()
    ]
    note = ""
    if rows:
        first = next(iter(rows.values()))
        shown.append(
            [
                "all mapped once, as stock vLLM's is",
                "",
                "",
                f"{_size(kv_bytes)} / {_size(kv_bytes)}",
                f"{kv_bytes / first.used.mean_live:.3f}",
                "",
                "",
                "",
                "",
            ]
        )
        note = (
            f"{first.requests:,} requests over {first.seconds:.0f} s. Ratios: byte-seconds mapped over "
            "byte-seconds in use by requests, and over those in use or kept as a prefix; p95: what mapped "
            "over in use exceeds in 5% of the time in which anything is in use."
        )
    return Table(title, columns, shown, " ".join([note, *notes]).strip())


def _idle(rows: Mapping[str, Held], kv_bytes: int, chunk: int) -> Table:
    targets = []
    for held in list(rows.values())[:1]:
        targets = [
            ["after the load, nobody asks", _size(held.idle), "warm prefixes stay", ""],
            target_row(
                "after a higher class has taken what it could",
                _size(held.emptied),
                f"at most one extent, {_size(chunk)}",
                held.emptied <= chunk,
            ),
        ]
    return Table(
        "Idle footprint", TARGET_COLUMNS, targets, f"Stock vLLM holds {_size(kv_bytes)} at all times."
    )


def _size(nbytes: float) -> str:
    return tem.format_bytes(round(nbytes))
