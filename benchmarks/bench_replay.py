"""Replays a torch memory snapshot against our core: what it reserves, beside what torch reserved.

Run as python -m benchmarks.bench_replay --help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

import torch_elastic_mem as tem
from benchmarks import lengths, machine, snapshots, traces
from benchmarks.contenders import NATIVE
from benchmarks.options import backend_option, errors_as_messages, out_option, size_option
from benchmarks.replay import replay
from benchmarks.results import Result, Table, command_line
from benchmarks.snapshots import SnapshotError, Trace
from benchmarks.terminal import progress, publish
from benchmarks.timing import summarise
from benchmarks.train_models import SHAPES
from benchmarks.train_worker import TrainRequest
from benchmarks.worker import Worker

SEED = 20
RECORDED_MODEL = "gpt-124m"
RECORDED_BATCH = 8
RECORDED_STEPS = 16


def record(path: Path, backend: str, trace: Path | None) -> None:
    """Records a training of the small GPT under torch's own allocator.

    Raises:
        WorkerError: it failed, as it does without a GPU.
    """
    shape = SHAPES[RECORDED_MODEL]
    requests = traces.read(trace) if trace else None
    found = lengths.chosen(requests, RECORDED_STEPS, shape.longest, SEED)
    turn = TrainRequest(RECORDED_MODEL, found, 1, RECORDED_BATCH, record=str(path.resolve()))
    with Worker("train_worker", NATIVE, backend) as worker:
        worker.ask(msgspec.to_builtins(turn))


def measure(
    backend: str, trace: Trace, capacity: int | None, rounds: int
) -> tuple[list[dict[str, Any]], str | None]:
    """Replays a trace, each time in an arena of its own; the readings and the GPU's UUID.

    Raises:
        tem.TemError: the device is missing, or too small for the trace.
    """
    if capacity is None and backend in ("host", "cpu"):
        capacity = trace.native_peak * 5 // 4 + (64 << 20)
    found = []
    uuid = None
    with progress("replaying", rounds) as advance:
        for _ in range(rounds):
            with tem.Arena(backend, capacity=capacity) as arena:
                found.append(replay(arena, trace))
                uuid = None if arena.backend == "host" else arena.uuid
            advance(1)
    return found, uuid


def tables(name: str, trace: Trace, rounds: Sequence[dict[str, Any]]) -> list[Table]:
    """Ours beside torch's own, and how fast the core went through it."""
    reserved = max(turn["reserved"] for turn in rounds)
    live = trace.peak_allocated
    rows = [
        [
            "torch, as recorded",
            tem.format_bytes(trace.native_peak),
            f"{trace.native_peak / live:.3f}",
            "",
            "",
            "",
        ],
        [
            "ours",
            tem.format_bytes(reserved),
            f"{reserved / live:.3f}",
            f"{reserved / trace.native_peak:.3f}",
            _rate(trace, [turn["first_ns"] for turn in rounds]),
            _rate(trace, [turn["again_ns"] for turn in rounds]),
        ],
    ]
    return [
        Table(
            f"Replay of {name}",
            [
                "allocator",
                "peak reserved",
                "fragmentation",
                "over torch's",
                "events, empty cache",
                "events, warm cache",
            ],
            rows,
            f"{trace.blocks} blocks on {len(trace.streams)} streams, {trace.pairs} of them freed again, "
            f"{tem.format_bytes(live)} live at the peak. fragmentation: peak reserved over what was live at "
            "the peak, as asked for. events: allocations and frees a second, one call each from Python.",
        )
    ]


def _rate(trace: Trace, nanoseconds: Sequence[int]) -> str:
    events = len(trace.steps) - trace.before
    return f"{events / summarise(nanoseconds).median * 1e9:,.0f}/s"


@click.command()
@click.argument(
    "snapshot", required=False, type=click.Path(path_type=Path, dir_okay=False, exists=True), default=None
)
@backend_option
@click.option(
    "--record",
    "recorded",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Record {RECORDED_MODEL} on a GPU under torch's allocator into this file first, and replay that.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="With --record: take sequence lengths from this trace. [default: seeded, log-normal]",
)
@size_option("--capacity", "Of the arena. [default: the GPU's; a quarter more than torch's peak on host]")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Replays.")
@out_option
def main(
    snapshot: Path | None,
    backend: str,
    recorded: Path | None,
    trace: Path | None,
    capacity: int | None,
    rounds: int,
    out: Path | None,
) -> None:
    """Replay SNAPSHOT, as torch.cuda.memory._dump_snapshot wrote it, against an account's malloc."""
    if (snapshot is None) == (recorded is None):
        raise click.UsageError("give a SNAPSHOT, or --record FILE to make one")
    with errors_as_messages():
        if recorded is not None:
            record(recorded, backend if backend not in ("host", "cpu") else "cuda", trace)
        path = snapshot or recorded
        if path is None:
            raise SnapshotError("there is no snapshot")
        found = snapshots.read(path)
        readings, uuid = measure(backend, found, capacity, rounds)
    result = Result(
        benchmark="bench_replay",
        command=command_line("bench_replay", sys.argv[1:]),
        machine=machine.facts(gpu_uuid=uuid),
        settings={
            "backend": backend,
            "snapshot": path.name,
            "rounds": rounds,
            "blocks": found.blocks,
            "events": len(found.steps) - found.before,
            "streams": len(found.streams),
        },
        tables=tables(path.name, found, readings),
        raw={
            "native_peak": found.native_peak,
            "peak_allocated": found.peak_allocated,
            "replays": readings,
        },
    )
    publish(result, out, backend)


if __name__ == "__main__":
    main()
