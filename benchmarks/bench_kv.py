"""Serves a request trace out of an elastic KV cache and records what it holds.

Run as python -m benchmarks.bench_kv --help.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from benchmarks import picture, traces
from benchmarks.kv_runs import LAYERS, Model, serve_all
from benchmarks.kv_tables import tables
from benchmarks.options import backend_option, errors_as_messages, out_option, size_option
from benchmarks.results import Result, command_line, default_path, save
from benchmarks.terminal import print_result

SYNTHETIC_REQUESTS = 2000
SEED = 20


@click.command()
@backend_option
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Azure CSV or Mooncake JSON lines. [default: a seeded synthetic trace of bursts]",
)
@click.option(
    "--speed",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="Requests come this many times as fast as in the trace.",
)
@click.option("--limit", type=click.IntRange(1), help="Serve only the first requests of the trace.")
@size_option("--capacity", "Bytes of the KV cache. [default: 48GiB; over --scale]")
@click.option(
    "--scale",
    type=click.Choice(["1", "2", "4", "8", "16", "32"]),
    help="Divide the model's layers by this. [default: 1; 32 on host]",
)
@click.option(
    "--compact-every",
    type=click.FloatRange(0, min_open=True),
    default=0.5,
    show_default=True,
    help="Simulated seconds between two compactions.",
)
@click.option(
    "--max-copies", type=click.IntRange(1), default=64, show_default=True, help="Blocks a compaction moves."
)
@out_option
def main(
    backend: str,
    trace: Path | None,
    speed: float,
    limit: int | None,
    capacity: int | None,
    scale: str | None,
    compact_every: float,
    max_copies: int,
    out: Path | None,
) -> None:
    """Grow and shrink a KV cache of Llama-3.1-8B's shape by the requests of a trace."""
    divisor = int(scale or (32 if backend == "host" else 1))
    model = Model(divisor, capacity or (48 << 30) // divisor)
    with errors_as_messages():
        found = traces.read(trace) if trace else traces.bursts(SYNTHETIC_REQUESTS, SEED)
        requests = [
            msgspec.structs.replace(request, arrival=request.arrival / speed) for request in found[:limit]
        ]
        runs, facts = serve_all(backend, model, requests, compact_every, max_copies)

    path = out or default_path("bench_kv", backend)
    source = trace.name if trace else "synthetic bursts"
    device = facts.get("gpu", "host memory")
    shape = f"Llama-3.1-8B's shape, {model.layers} of its {LAYERS} layers"
    title = f"KV cache of {shape}, {source} at {speed:g} times its speed, {device}"
    shown = [kv_run for kv_run in runs if "compaction" in kv_run.name or "fixed" in kv_run.name]
    picture.draw({kv_run.name: kv_run.curve for kv_run in shown}, title, path.with_suffix(".png"))
    settings: dict[str, Any] = {
        "backend": backend,
        "trace": source,
        "trace_fingerprint": traces.fingerprint(requests),
        "requests": len(requests),
        "speed": speed,
        "capacity": model.capacity,
        "layers": model.layers,
        "block_bytes": model.block_bytes,
        "compact_every_s": compact_every,
        "max_copies": max_copies,
    }
    result = Result(
        benchmark="bench_kv",
        command=command_line("bench_kv", sys.argv[1:]),
        machine=facts,
        settings=settings,
        tables=tables(title, runs),
        raw={"runs": msgspec.to_builtins(runs)},
        pictures=[path.with_suffix(".png").name],
    )
    print_result(result)
    save(result, path)
    click.echo(f"saved {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
