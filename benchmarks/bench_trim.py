"""How long it takes until cached memory is another account's, beside work that is queued.

Run as python -m benchmarks.bench_trim --help.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import torch_elastic_mem as tem
from benchmarks import machine
from benchmarks.contenders import EXPANDABLE, NATIVE
from benchmarks.figures import spread, time_of
from benchmarks.options import backend_option, errors_as_messages, out_option, size_option
from benchmarks.results import (
    TARGET_COLUMNS,
    Result,
    Table,
    command_line,
    target_row,
)
from benchmarks.terminal import progress, publish
from benchmarks.timing import collector_paused, paired_ratio, summarise
from benchmarks.trim_cases import GRANTED, RELEASED, Trims
from benchmarks.trim_load import load_on
from benchmarks.worker import WorkerError, started

MIB = 1 << 20
GIB = 1 << 30
BLOCK = 256 * MIB
TARGET = 1.25
WARMUP = 1

CASES = {
    GRANTED: "mapped for another account; driver: unmap here, map there",
    RELEASED: "back with the device; driver: unmap and release",
}


def measure(
    backend: str, cache: int | None, back: int, queue_ms: float, rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str], int, str | None]:
    """Ours, the bare driver, and torch's own allocators, in turns.

    Returns:
        Turns by contender, failures by contender, the size of the cache, and the GPU's UUID.

    Raises:
        tem.TemError: the device is missing, or too small.
    """
    host = backend in ("host", "cpu")
    block = 4 * MIB if host else BLOCK
    if cache is None:
        cache = 16 * back if host else _what_fits(backend, back)
    cache = cache // block * block
    if cache < 2 * back:
        raise tem.InvalidArgument(f"a cache of {tem.format_bytes(cache)} is too small to take from")
    others = [] if host else [NATIVE, EXPANDABLE]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ["ours", *others]}
    failures: dict[str, str] = {}
    request = {"cache": cache, "queue_ms": queue_ms}
    with (
        started("trim_worker", others, backend) as workers,
        tem.Arena(backend, capacity=cache, reserve=(0, 0)) as arena,
    ):
        load = load_on(arena.backend, arena.device, queue_ms)
        trims = Trims(arena, load, cache, back, block)
        with progress("giving back", WARMUP + rounds) as advance, collector_paused():
            for number in range(WARMUP + rounds):
                turns: dict[str, Any] = {"ours": trims.turn()}
                for name in [name for name in workers if name not in failures]:
                    try:
                        turns[name] = workers[name].ask(request)
                    except WorkerError as error:
                        failures[name] = str(error)
                        del found[name]
                for name in [name for name in turns if number >= WARMUP]:
                    found[name].append(turns[name])
                advance(1)
        trims.close()
        uuid = None if host else arena.uuid
    return found, failures, cache, uuid


def _what_fits(backend: str, back: int) -> int:
    with tem.Arena(backend) as arena:
        return min(40 * GIB, (arena.capacity - back) * 3 // 4)


def tables(
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    failures: Mapping[str, str],
    cache: int,
    back: int,
    queue_ms: float,
) -> list[Table]:
    """Ours beside the driver, torch's own below, and the targets."""
    amount, whole = tem.format_bytes(back), tem.format_bytes(cache)
    ours = found["ours"]
    rows, targets = [], []
    for case, what in CASES.items():
        spent = [turn[case]["ns"] for turn in ours]
        floor = [turn[f"floor {case}"]["ns"] for turn in ours]
        ratio = paired_ratio(spent, floor)
        rows.append(
            [
                f"{amount} {what}",
                time_of(summarise(floor)),
                time_of(summarise(spent)),
                spread(ratio),
                _drained([turn[case] for turn in ours]),
            ]
        )
        met = ratio.median <= TARGET
        targets.append(target_row(f"{amount} {what}", f"{ratio.median:.3f}", f"at most {TARGET}", met))
    for name, turns in found.items():
        if name == "ours":
            continue
        freed = tem.format_bytes(round(summarise([turn["freed"] for turn in turns]).median))
        what = f"torch {name}: empty_cache() and mem_get_info(), {freed} back"
        rows.append([what, "", time_of(summarise([turn["ns"] for turn in turns])), "", _drained(turns)])
    extents = ours[-1][GRANTED]
    note = (
        f"{whole} of free blocks, {queue_ms:g} ms of work queued behind their frees. The driver moves "
        f"extents of {tem.format_bytes(extents['extent'])}, as ours did: {extents['extents']} of them. "
        "Ratio: median of ours over the driver, round by round, with its quartiles. queue drained: in how "
        "many rounds the queued work was done by then; if it was not, nothing waited for it."
    )
    note = " ".join([note, *[f"Failed: {failure}." for failure in failures.values()]])
    columns = ["what", "driver", "time", "ratio", "queue drained"]
    return [
        Table(f"{amount} out of a cache, beside queued work", columns, rows, note),
        Table("Targets", TARGET_COLUMNS, targets),
    ]


def _drained(turns: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(turn['drained'] for turn in turns)} of {len(turns)}"


@click.command()
@backend_option
@size_option("--cache", "Bytes of free blocks. [default: 40GiB or what fits; 16 times --back on host]")
@size_option("--back", "Bytes that come back. [default: 8GiB; 16MiB on host]")
@click.option(
    "--queue-ms",
    type=click.FloatRange(1),
    default=200,
    show_default=True,
    help="Milliseconds of work queued behind the frees.",
)
@click.option("--rounds", type=click.IntRange(2), default=5, show_default=True, help="Readings of each case.")
@out_option
def main(
    backend: str, cache: int | None, back: int | None, queue_ms: float, rounds: int, out: Path | None
) -> None:
    """Take memory out of a cache of free blocks while the device has work queued."""
    host = backend in ("host", "cpu")
    back = back or (16 * MIB if host else 8 * GIB)
    with errors_as_messages():
        found, failures, cache, uuid = measure(backend, cache, back, queue_ms, rounds)
    result = Result(
        benchmark="bench_trim",
        command=command_line("bench_trim", sys.argv[1:]),
        machine=machine.facts(gpu_uuid=uuid),
        settings={
            "backend": backend,
            "cache": cache,
            "back": back,
            "queue_ms": queue_ms,
            "rounds": rounds,
        },
        tables=tables(found, failures, cache, back, queue_ms),
        raw={"turns": found, "failures": failures},
    )
    publish(result, out, backend, failures.values())


if __name__ == "__main__":
    main()
