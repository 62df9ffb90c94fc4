"""Round trips of a demand that free memory covers, among idle and busy clients, and the broker's own memory.

Run as python -m benchmarks.bench_broker --help.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

import torch_elastic_mem as tem
from benchmarks import machine
from benchmarks.broker_process import BrokerProcess
from benchmarks.figures import time_of
from benchmarks.options import errors_as_messages, out_option
from benchmarks.results import TARGET_COLUMNS, Result, Table, command_line, target_row
from benchmarks.terminal import progress, publish
from benchmarks.timing import percentile, summarise
from benchmarks.worker import started
from torch_elastic_mem.broker.paths import BROKER

IDLE, CROWD, BUSY = 200, 2000, 20
PACE_S = 0.02  # of a busy client: fifty demands a second
PARTS = 10


@contextmanager
def serving(options: list[str]) -> Iterator[BrokerProcess]:
    """A broker that the processes started meanwhile find."""
    with BrokerProcess(options) as broker:
        before = os.environ.get(BROKER)
        os.environ[BROKER] = broker.path
        try:
            yield broker
        finally:
            os.environ.pop(BROKER)
            if before is not None:
                os.environ[BROKER] = before


@click.command()
@click.option("--rounds", default=2000, show_default=True, type=click.IntRange(10))
@click.option("--grants", default=400_000, show_default=True, type=click.IntRange(10))
@out_option
def main(rounds: int, grants: int, out: Path | None) -> None:
    """Times the broker: a demand that free memory covers, from the call to its return."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the broker inherits it
    raw: dict[str, list[float]] = {}
    memory: list[int] = []
    names = ["timed", *(f"busy{number}" for number in range(BUSY))]
    options = ["--device", "HOST=8GiB", "--reserve", "HOST=0,0"]
    with (
        errors_as_messages(),
        serving(options) as broker,
        started("broker_worker", names, "host") as workers,
    ):
        timed = workers["timed"]
        for worker in workers.values():
            worker.ask({"do": "time", "rounds": 1, "pause": 0.0})

        def series(name: str, pause: float = 0.0, count: int = rounds) -> None:
            raw[name] = timed.ask({"do": "time", "rounds": count, "pause": pause})

        series("alone")
        series("alone, 1 ms apart", 0.001, rounds // 4)
        timed.ask({"do": "connect", "count": IDLE})
        for name in names[1:]:
            workers[name].ask({"do": "start", "pause": PACE_S})
        series("200 idle, 20 busy")
        for name in names[1:]:
            workers[name].ask({"do": "stop"})
        crowd = timed.ask({"do": "connect", "count": CROWD})
        series(f"{crowd} idle")
        with progress("grants", grants) as advance:
            for _ in range(PARTS):
                timed.ask({"do": "time", "rounds": grants // PARTS, "pause": 0.0}, timeout=3600)
                memory.append(broker.resident())
                advance(grants // PARTS)
    rows = []
    for name, values in raw.items():
        tail = f"{percentile(values, 99) / 1000:.1f} us"
        rows.append([name, time_of(summarise(values)), tail])
    trips = Table(
        "A demand that free memory covers",
        ["clients", "median", "p99"],
        rows,
        f"From Account.reserve to its return. A busy client makes {1 / PACE_S:.0f} demands a second.",
    )
    # The first half fills the journal of events, which is bounded.
    growth = memory[-1] - memory[PARTS // 2 - 1]
    flat = Table(
        f"The broker's memory over {grants} grants",
        ["after", "resident"],
        [[f"{(part + 1) * grants // PARTS}", tem.format_bytes(size)] for part, size in enumerate(memory)],
    )
    busy = raw["200 idle, 20 busy"]
    median, tail_us = summarise(busy).median / 1000, percentile(busy, 99) / 1000
    targets = [
        target_row("round trip, 200 idle and 20 busy, median", f"{median:.1f} us", "40 us", median <= 40),
        target_row("the same, p99", f"{tail_us:.1f} us", "150 us", tail_us <= 150),
        target_row("clients at once", str(crowd), str(CROWD), crowd >= CROWD),
        target_row(
            "memory gained over the second half of the grants",
            tem.format_bytes(max(0, growth)),
            "1 MiB",
            growth <= 1 << 20,
        ),
    ]
    result = Result(
        "bench_broker",
        command_line("bench_broker", sys.argv[1:]),
        machine.facts(),
        {"rounds": rounds, "grants": grants},
        [trips, flat, Table("Targets", TARGET_COLUMNS, targets)],
        {"round_trips": raw, "memory": memory},
    )
    publish(result, out, "host")


if __name__ == "__main__":
    main()
