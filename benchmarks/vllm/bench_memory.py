"""One vLLM engine on an arena serves a trace: bytes mapped over bytes in use, and what it holds when idle.

Run as python -m benchmarks.vllm.bench_memory --help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from benchmarks import machine, picture, traces
from benchmarks.options import backend_option, errors_as_messages, out_option, size_option
from benchmarks.results import Result, command_line, default_path
from benchmarks.terminal import progress, publish
from benchmarks.traces import Request
from benchmarks.vllm.engine import OURS, Opening
from benchmarks.vllm.memory_tables import tables
from benchmarks.vllm.memory_worker import Held, Trace
from benchmarks.vllm.shapes import SHAPES
from benchmarks.worker import Worker, WorkerError
from torch_elastic_mem.device import device_of

MIB, GIB = 1 << 20, 1 << 30
SEED = 20
STARTING = 400.0
# An engine that is behind has so long after the last arrival, or it is taken for stuck.
DRAIN = 240.0
UNASKED, ASKED = "nobody asks", "asked each second for what costs no request"
# How often it is asked, and whether it moves blocks for that.
TREATMENTS = {UNASKED: (0.0, True), ASKED: (1.0, True), "the same, without compaction": (1.0, False)}


def chosen(found: Sequence[Request], speed: float, seconds: float, longest: int) -> list[Request]:
    """The requests of the first `seconds`, at `speed` times their pace, cut to what the model takes."""
    cut = []
    for each in found:
        if each.arrival / speed >= seconds:
            break
        output = min(each.output, longest // 2)
        cut.append(Request(each.arrival / speed, min(each.prompt, longest - output), output))
    return cut


@click.command()
@backend_option
@click.option("--shape", type=click.Choice(list(SHAPES)), help="[default: llama-8b; tiny on host]")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Azure CSV or Mooncake JSON lines. [default: a seeded synthetic trace of bursts]",
)
@click.option("--speed", default=2.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="[default: 150; 20 on host]")
@size_option("--kv", "Bytes of the cache. [default: 48GiB; 64MiB on host]")
@click.option("--eager", is_flag=True, help="Without CUDA graphs and compilation.")
@out_option
def main(
    backend: str,
    shape: str | None,
    trace: Path | None,
    speed: float,
    seconds: float | None,
    kv: int | None,
    eager: bool,
    out: Path | None,
) -> None:
    """What an engine's cache holds over a trace of requests, beside what is in use."""
    on_cuda = device_of(backend)[0] == "cuda"
    shape = shape or ("llama-8b" if on_cuda else "tiny")
    kv = kv or (48 * GIB if on_cuda else 64 * MIB)
    opening = (
        Opening(shape, kv, 8192, eager, batched_tokens=2048, seqs=256)
        if on_cuda
        else Opening(shape, kv, 1024, eager=True, batched_tokens=512, seqs=16, block_size=32)
    )
    seconds = seconds or (150.0 if on_cuda else 20.0)
    source = trace.name if trace else "synthetic bursts"
    rows: dict[str, Held] = {}
    failures = []
    with errors_as_messages():
        found = traces.read(trace) if trace else traces.bursts(20_000, SEED)
        requests = chosen(found, speed, seconds, opening.max_model_len)
        with Worker("vllm.memory_worker", OURS, backend) as worker:
            facts = worker.ask({"open": msgspec.to_builtins(opening)}, STARTING)
            with progress("serving", len(TREATMENTS)) as advance:
                for number, (name, (every, compacted)) in enumerate(TREATMENTS.items()):
                    asked = Trace(requests, SEED + number, SHAPES[shape]["vocab_size"], every, compacted)
                    try:
                        seen = worker.ask({"trace": msgspec.to_builtins(asked)}, seconds + DRAIN)
                    except WorkerError as error:
                        failures.append(f"{name} failed: {error}.")
                        break
                    rows[name] = msgspec.convert(seen, Held)
                    advance(1)
    described = machine.facts(gpu_uuid=facts["uuid"] if on_cuda else None)
    path = out or default_path("bench_memory", backend)
    title = f"One engine, {shape}, {source} at {speed:g} times its speed"
    pictures = []
    if rows:
        picture.draw(
            {name: held.curve for name, held in rows.items()}, title, path.with_suffix(".png"), "seconds"
        )
        pictures = [path.with_suffix(".png").name]
    settings: dict[str, Any] = {
        "opening": msgspec.to_builtins(opening),
        "trace": source,
        "trace_fingerprint": traces.fingerprint(requests),
        "requests": len(requests),
        "speed": speed,
        "seconds": seconds,
    }
    result = Result(
        "bench_memory",
        command_line("vllm.bench_memory", sys.argv[1:]),
        described,
        settings,
        tables(title, rows, kv, facts["chunk_bytes"], failures),
        {"engine": facts, "rows": msgspec.to_builtins(rows)},
        pictures,
    )
    publish(result, path, backend, failures)


if __name__ == "__main__":
    main()
