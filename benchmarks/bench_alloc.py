"""What a pair of allocate and free costs: ours, and torch's own caching allocator.

Run as python -m benchmarks.bench_alloc --help.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

import torch_elastic_mem as tem
from benchmarks import contenders, machine
from benchmarks.alloc_cases import LIVE, SEED, SIZES, THREADS, Effort, name_of
from benchmarks.alloc_loop import Loop, malloc_library, torch_library
from benchmarks.alloc_tables import by_case, cuda_tables, host_tables
from benchmarks.options import backend_option, errors_as_messages, out_option
from benchmarks.results import Result, Table, command_line
from benchmarks.terminal import publish
from benchmarks.timing import interleave
from benchmarks.worker import started, take_turns
from torch_elastic_mem import _C
from torch_elastic_mem.device import device_of

HOST_CAPACITY = 512 << 20

Cases = dict[str, dict[str, list[float]]]
Measured = tuple[Cases, list[Table], dict[str, str], str | None]


def on_cuda(backend: str, rounds: int, effort: Effort) -> Measured:
    """Each contender in a process of its own, in turns.

    Raises:
        BuildError: the loops do not build.
    """
    torch_library()  # once, before the workers all want it
    request = {"effort": msgspec.to_builtins(effort)}
    with started("alloc_worker", contenders.names(backend), backend) as workers:
        turns = take_turns(workers, request, rounds, label="pairs of allocate and free")
    cases = by_case(turns.answers)
    uuids = [answers[0]["uuid"] for answers in turns.answers.values()]
    return cases, cuda_tables(cases, turns.failures), turns.failures, uuids[0] if uuids else None


def on_host(rounds: int, effort: Effort) -> Measured:
    """The core alone, beside malloc."""
    floor = Loop(malloc_library())
    cases: Cases = {}
    with tem.Arena("host", capacity=HOST_CAPACITY) as arena, arena.account("core") as account:
        core = account.allocator()

        def ours(nbytes: int, threads: int) -> float:
            return _C.bench_malloc(core, nbytes, 0, effort.pairs, threads) * 1e9

        for size, nbytes in SIZES.items():
            for threads in THREADS:
                case = name_of(size, threads)
                cases[case] = interleave(
                    {
                        "malloc": partial(floor.pairs, nbytes, effort.pairs, threads),
                        "core": partial(ours, nbytes, threads),
                    },
                    rounds,
                    label=case,
                    warmup=1,
                )
    return cases, host_tables(cases), {}, None


@click.command()
@backend_option
@click.option("--rounds", type=click.IntRange(2), default=7, show_default=True, help="Readings of each case.")
@click.option("--pairs", type=click.IntRange(1), default=20_000, show_default=True, help="Pairs a reading.")
@out_option
def main(backend: str, rounds: int, pairs: int, out: Path | None) -> None:
    """Time pairs of allocate and free: ours, and torch's own allocator; on the host, core and malloc."""
    effort = Effort(pairs, pairs // 4 + 1, pairs)
    with errors_as_messages():
        host = device_of(backend)[0] == "host"
        cases, tables, failures, uuid = on_host(rounds, effort) if host else on_cuda(backend, rounds, effort)
    settings: dict[str, Any] = {
        "backend": backend,
        "rounds": rounds,
        "effort": msgspec.to_builtins(effort),
        "live": LIVE,
        "seed": SEED,
    }
    result = Result(
        benchmark="bench_alloc",
        command=command_line("bench_alloc", sys.argv[1:]),
        machine=machine.facts(gpu_uuid=uuid),
        settings=settings,
        tables=tables,
        raw={"cases": cases, "failures": failures},
    )
    publish(result, out, backend, failures.values())


if __name__ == "__main__":
    main()
