"""What a broker takes to grant what is free, beside many connections, and whether its memory stays flat.

Run as python -m benchmarks.bench_broker --help.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

import torch_elastic_mem as tem
from benchmarks import machine
from benchmarks.broker_client import Figures, Load, Named, demands, echo
from benchmarks.broker_process import BrokerProcess
from benchmarks.figures import time_of
from benchmarks.options import backend_option, errors_as_messages, out_option
from benchmarks.results import TARGET_COLUMNS, Result, Table, command_line, target_row
from benchmarks.terminal import progress, publish
from benchmarks.timing import Summary, percentile, summarise

MANY = 2000
OPTIONS = ["--device", "HOST=64GiB"]
# The broker's journal of events fills with the first grants; from there on its memory must be flat.
JOURNAL = 65_536
TENTHS = 10

FLOOR = "bare socket: a message of a demand's size, and one of a grant's"
ALONE = "200 idle; one demand after the other"
SPACED = "200 idle; a demand every ms"
PACED = "200 idle, and 20 that demand every 20 ms; a demand every ms"
FLAT_OUT = "200 idle, and 20 that demand without a rest; one demand after the other"
CROWD = f"{MANY:,} idle; a demand every ms"
LOADS = {
    ALONE: Load(),
    SPACED: Load(gap=1000),
    PACED: Load(busy=20, pause=20_000, gap=1000),
    FLAT_OUT: Load(busy=20),
    CROWD: Load(idle=MANY, gap=1000),
}
_P50_US = 40.0
_P99_US = 150.0
_GROWTH = 1.02


class Readings(msgspec.Struct):
    """All that was read.

    Attributes:
        floor: of the bare socket. loads: of the broker, by what was connected. resident: its bytes of memory
            with those connections. tenths: its bytes after each tenth of the grants, the first before any.
        cpu: seconds of CPU that those grants took it. grants: how many they were.
    """

    floor: Figures
    loads: dict[str, Figures]
    resident: dict[str, int]
    tenths: list[int]
    cpu: float
    grants: int


def measure(device: Named, rounds: int, grants: int) -> Readings:
    """Runs everything on one broker.

    Raises:
        BuildError, WorkerError: the client does not build, or the broker did not grant.
    """
    config = f"[[grant]]\nuid = {os.geteuid()}\nmax_value = 1000\nconnections = {2 * MANY}\n"
    found = Readings(echo(rounds), {}, {}, [], 0.0, grants // TENTHS * TENTHS)
    with (
        BrokerProcess(OPTIONS if device.uuid == "HOST" else [], config) as broker,
        progress("grants", len(LOADS) + TENTHS) as advance,
    ):
        for what, load in LOADS.items():

            def look(what: str = what) -> None:
                found.resident[what] = broker.resident()

            found.loads[what] = demands(broker.path, load, rounds, look, device=device)
            advance(1)
        demands(broker.path, Load(), min(grants, JOURNAL), device=device)
        found.tenths.append(broker.resident())
        before = broker.cpu_seconds()
        for _ in range(TENTHS):
            demands(broker.path, Load(), grants // TENTHS, device=device)
            found.tenths.append(broker.resident())
            advance(1)
        found.cpu = broker.cpu_seconds() - before
    return found


def tables(found: Readings) -> list[Table]:
    """Round trips, memory, and the targets."""
    rows = [_row(FLOOR, found.floor, 0)]
    rows += [_row(what, figures, found.resident[what]) for what, figures in found.loads.items()]
    note = (
        "From the sending of DEMAND to the receiving of GRANT in a client in C++, for 2 MiB that are free; a "
        "RETURN of them follows, so that the next of several demands waits for that too. Others: demands a "
        "second of the busy connections together."
    )
    columns = ["what", "p50", "p99", "others", "broker's memory"]
    memory = Table(
        f"Memory of the broker over {found.grants:,} grants, with 200 idle connections",
        ["grants", "resident"],
        [
            [f"{found.grants * tenth // TENTHS:,}", tem.format_bytes(resident)]
            for tenth, resident in enumerate(found.tenths)
        ],
        f"CPU of the broker for a DEMAND, its GRANT and the RETURN: {found.cpu / found.grants * 1e6:.1f} us.",
    )
    return [
        Table("A demand that free memory covers", columns, rows, note),
        memory,
        Table("Targets", TARGET_COLUMNS, _targets(found)),
    ]


def _row(what: str, figures: Figures, resident: int) -> list[str]:
    p99 = percentile(figures.readings, 99)
    return [
        what,
        time_of(summarise(figures.readings)),
        time_of(Summary(p99, p99, p99, 1)),
        f"{figures.others:,.0f}/s" if figures.others else "",
        tem.format_bytes(resident) if resident else "",
    ]


def _targets(found: Readings) -> list[list[str]]:
    rows = []
    for what in (ALONE, PACED):
        readings = found.loads[what].readings
        p50, p99 = summarise(readings).median / 1e3, percentile(readings, 99) / 1e3
        rows.append(target_row(f"{what}: p50", f"{p50:.1f} us", f"at most {_P50_US:g} us", p50 <= _P50_US))
        rows.append(target_row("the same: p99", f"{p99:.1f} us", f"at most {_P99_US:g} us", p99 <= _P99_US))
    growth = found.tenths[-1] / found.tenths[0]
    what = f"memory after {found.grants:,} grants, over that before"
    return [*rows, target_row(what, f"{growth:.3f}", f"at most {_GROWTH:g}", growth <= _GROWTH)]


def run(backend: str, rounds: int, grants: int, arguments: Sequence[str]) -> Result:
    """Measures, and makes the result.

    Raises:
        tem.TemError: the device is missing. BuildError, WorkerError: as `measure`.
    """
    device, uuid = Named(), None
    if backend not in ("host", "cpu"):
        with tem.Arena(backend, broker=None) as arena:
            device, uuid = Named(arena.uuid, arena.capacity), arena.uuid
    found = measure(device, rounds, grants)
    return Result(
        benchmark="bench_broker",
        command=command_line("bench_broker", arguments),
        machine=machine.facts(gpu_uuid=uuid),
        settings={"backend": backend, "rounds": rounds, "grants": grants},
        tables=tables(found),
        raw=msgspec.to_builtins(found),
    )


@click.command()
@backend_option
@click.option(
    "--rounds", type=click.IntRange(20), default=5000, show_default=True, help="Demands timed of each kind."
)
@click.option(
    "--grants",
    type=click.IntRange(TENTHS),
    default=200_000,
    show_default=True,
    help="Over which the broker's memory is watched.",
)
@out_option
def main(backend: str, rounds: int, grants: int, out: Path | None) -> None:
    """Time a broker's answers with many connected, and watch its memory.

    On a GPU the broker looks at its memory meanwhile; clients only name it.
    """
    with errors_as_messages():
        result = run(backend, rounds, grants, sys.argv[1:])
    publish(result, out, backend)


if __name__ == "__main__":
    main()
