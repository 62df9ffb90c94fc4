"""Takes memory and gives it back, beside the bare driver in the same run.

Run as python -m benchmarks.bench_map --help.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import click
import msgspec
import torch

import torch_elastic_mem as tem
from benchmarks import machine
from benchmarks.floor import Floor
from benchmarks.map_tables import Readings, tables
from benchmarks.options import backend_option, errors_as_messages, out_option, size_option
from benchmarks.results import Result, command_line
from benchmarks.terminal import publish
from benchmarks.timing import elapsed_ns, interleave
from torch_elastic_mem import _C

MIB = 1 << 20
FIXED_PAGE = 2 * MIB
LARGE = 64 * MIB
EXTENTS = [2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB, LARGE]
ENSURED_BLOCKS = [1, 2, 4, 8, 16, 32, 64]
ENSURE_CALLS = 1000


class Bench:
    """One run on one device: every method measures one thing, interleaved with its floor."""

    def __init__(self, backend: str, device: str, size: int, rounds: int) -> None:
        self._backend = backend
        self._device = device
        self._size = size
        self._rounds = rounds

    def cold(self, extent: int | None) -> Readings:
        """Takes from nothing and gives all back, in extents of one size or of the arena's choice."""
        with (
            Floor(self._device, self._size, extent or LARGE) as floor,
            tem.Arena(self._backend, capacity=self._size, reserve=(0, 0)) as arena,
            arena.account("bench") as account,
            closing(account.range(self._size, extent=extent or 0)) as memory,
        ):
            return self._interleave(
                f"take and give, {tem.format_bytes(extent) if extent else 'own choice'}",
                {
                    "floor_take": floor.take,
                    "floor_give": floor.give,
                    "take": lambda: elapsed_ns(lambda: memory.grow(self._size)),
                    "give": lambda: elapsed_ns(lambda: memory.shrink(self._size)),
                },
            )

    def warm(self) -> Readings:
        """Takes from a full reserve, beside pools of held extents and the loop of fixed pages."""
        with (
            Floor(self._device, self._size, LARGE) as pooled,
            Floor(self._device, self._size, FIXED_PAGE) as pooled_pages,
            Floor(self._device, self._size, FIXED_PAGE) as pages,
            # Every byte is in the reserve or in `rest`: with more, the arena's thread would create extents
            # for the next burst beside what is timed here.
            tem.Arena(self._backend, capacity=self._size + FIXED_PAGE, reserve=(0, self._size)) as arena,
            arena.account("rest") as rest,
            closing(rest.range(FIXED_PAGE)) as other,
            arena.account("bench") as account,
            closing(account.range(self._size)) as memory,
        ):
            arena.refill()
            other.grow(FIXED_PAGE)
            pooled.hold()
            pooled_pages.hold()

            def refill() -> float:
                start = time.perf_counter_ns()
                arena.refill()
                spent = time.perf_counter_ns() - start
                spare = arena.snapshot().spare
                if spare < self._size:
                    raise click.ClickException(
                        f"the reserve is not warm: {tem.format_bytes(spare)} after a refill"
                    )
                return spent

            return self._interleave(
                "take from a warm reserve",
                {
                    "refill": refill,
                    "floor_take_pooled": pooled.take_pooled,
                    "take": lambda: elapsed_ns(lambda: memory.grow(self._size)),
                    "floor_give_pooled": pooled.give_pooled,
                    "give": lambda: elapsed_ns(lambda: memory.shrink(self._size)),
                    "pages_take_pooled": pooled_pages.take_pooled,
                    "pages_give_pooled": pooled_pages.give_pooled,
                    "pages_take": pages.take,
                    "pages_give": pages.give,
                },
            )

    def handover(self) -> Readings:
        """A higher class takes everything a lower one holds, fences passed; the lower one takes it back."""
        with (
            Floor(self._device, self._size, LARGE) as floor,
            tem.Arena(self._backend, capacity=self._size, reserve=(0, 0)) as arena,
            arena.account("low", priority="idle") as low,
            arena.account("high", priority="serving") as high,
            closing(low.range(self._size)) as lent,
            closing(high.range(self._size)) as wanted,
        ):
            floor.take()
            lent.grow(self._size)

            def reclaim(nbytes: int, timeout: float) -> None:
                lent.shrink(min(nbytes, lent.mapped))

            def reset() -> float:
                wanted.shrink(self._size)
                return elapsed_ns(lambda: lent.grow(self._size))

            reclaimer = low.on_reclaim(reclaim, rung="evict")
            try:
                return self._interleave(
                    "yield between two accounts",
                    {
                        "floor_handover": floor.handover,
                        "yield": lambda: elapsed_ns(lambda: wanted.grow(self._size)),
                        "reset": reset,
                    },
                )
            finally:
                reclaimer.remove()

    def ensure(self) -> tuple[Readings, Readings]:
        """Nanoseconds a call for blocks that are resident already, by number: from Python, and in C++."""
        most = max(ENSURED_BLOCKS)
        with (
            tem.Arena(self._backend, capacity=256 * MIB, reserve=(0, 0)) as arena,
            arena.account("bench") as account,
            closing(tem.ElasticKVTensor(account, most, (2, 16, 8, 128), torch.bfloat16, layers=32)) as kv,
        ):
            kv.ensure(list(range(most)))

            def from_python(blocks: list[int]) -> float:
                ensure = kv.ensure
                start = time.perf_counter_ns()
                for _ in range(ENSURE_CALLS):
                    ensure(blocks)
                return (time.perf_counter_ns() - start) / ENSURE_CALLS

            cases: dict[str, Callable[[], float]] = {}
            for count in ENSURED_BLOCKS:
                blocks = list(range(count))
                cases[f"python {count}"] = partial(from_python, blocks)
                cases[f"core {count}"] = partial(_C.bench_ensure, kv._core, blocks, ENSURE_CALLS)
            readings = self._interleave("ensure of resident blocks", cases)
            kv.release(list(range(most)))
        python = {str(count): readings[f"python {count}"] for count in ENSURED_BLOCKS}
        core = {str(count): readings[f"core {count}"] for count in ENSURED_BLOCKS}
        return python, core

    def _interleave(self, label: str, cases: Mapping[str, Callable[[], float]]) -> Readings:
        return interleave(cases, self._rounds, label=label)


def run(backend: str, size: int, rounds: int, arguments: Sequence[str]) -> Result:
    """Measures everything on one device.

    Args:
        backend: "host", "cuda" or "cuda:1".
        size: bytes to take and give back, a multiple of 64 MiB.
        rounds: readings of each case.
        arguments: the command's, for the record.

    Raises:
        tem.TemError: the device is missing or refused.
        FloorError: the floor does not build or the bare driver refused.
    """
    with tem.Arena(backend, capacity=size) as arena:
        device, gpu_uuid = arena.device, None if arena.backend == "host" else arena.uuid
    bench = Bench(backend, device, size, rounds)
    raw = {f"cold {tem.format_bytes(extent)}": bench.cold(extent) for extent in EXTENTS}
    raw["cold own choice"] = bench.cold(None)
    raw["warm"] = bench.warm()
    raw["handover"] = bench.handover()
    raw["ensure python"], raw["ensure core"] = bench.ensure()
    return Result(
        benchmark="bench_map",
        command=command_line("bench_map", arguments),
        machine=machine.facts(gpu_uuid=gpu_uuid),
        settings={"backend": backend, "size": size, "rounds": rounds},
        tables=tables(size, raw),
        raw=msgspec.to_builtins(raw),
    )


@click.command()
@backend_option
@size_option("--size", "Bytes to take, in whole 64 MiB. [default: 1GiB; 256MiB on host]")
@click.option(
    "--rounds", type=click.IntRange(2), default=20, show_default=True, help="Readings of each case."
)
@out_option
def main(backend: str, size: int | None, rounds: int, out: Path | None) -> None:
    """Take memory and give it back by extent size, beside the bare driver and a loop of 2 MiB pages."""
    if size is None:
        size = 256 * MIB if backend == "host" else 1024 * MIB
    if size <= 0 or size % LARGE:
        raise click.BadParameter("must be a multiple of 64 MiB", param_hint="--size")
    with errors_as_messages():
        result = run(backend, size, rounds, sys.argv[1:])
    publish(result, out, backend)


if __name__ == "__main__":
    main()
