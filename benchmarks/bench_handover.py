"""Hands memory from one process to another through the broker, beside the bare driver in the same run.

Run as python -m benchmarks.bench_handover --help.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

import torch_elastic_mem as tem
from benchmarks import machine
from benchmarks.broker_process import broker
from benchmarks.figures import spread, time_of
from benchmarks.handover_worker import EXTENT, FIXED_PAGE
from benchmarks.options import backend_option, errors_as_messages, out_option, size_option
from benchmarks.results import TARGET_COLUMNS, Result, Table, command_line, target_row
from benchmarks.terminal import progress, publish
from benchmarks.timing import paired_ratio, percentile, summarise
from benchmarks.worker import Worker, started

# Left to contexts and to what the bare driver hands over, on a GPU.
ASIDE = 6 << 30
GIL_HELD = 0.5  # seconds
MILLISECOND = 1e6

Readings = dict[str, list[float]]


class Pair:
    """The two processes."""

    def __init__(self, hog: Worker, taker: Worker, size: int) -> None:
        self._hog = hog
        self._taker = taker
        self._size = size

    def bare(self, extent: int) -> float:
        """The bare driver: the hog unmaps and releases, the taker creates and maps.

        What it takes to tell is not counted. The hog has it back afterwards.
        """
        given: int = self._hog.ask({"do": "floor_give", "extent": extent})
        taken: int = self._taker.ask({"do": "floor_take", "size": self._size, "extent": extent})
        self._taker.ask({"do": "floor_give", "extent": extent})
        self._hog.ask({"do": "floor_take", "size": self._size, "extent": extent})
        return given + taken

    def prepare_bare(self, extent: int) -> None:
        self._hog.ask({"do": "floor_take", "size": self._size, "extent": extent})

    def create(self) -> float:
        """The bare driver's create and map, with memory to spare."""
        taken: int = self._taker.ask({"do": "floor_take", "size": self._size, "extent": EXTENT})
        self._taker.ask({"do": "floor_give", "extent": EXTENT})
        return taken

    def take(self) -> float:
        taken: int = self._taker.ask({"do": "take", "size": self._size})
        return taken

    def give(self) -> None:
        self._taker.ask({"do": "give"})

    def refill(self) -> None:
        self._hog.ask({"do": "fill"})


def measure(hog: Worker, taker: Worker, size: int, rounds: int) -> Readings:
    """All rows, round by round, so that what is compared ran in the same minute."""
    pair = Pair(hog, taker, size)
    names = ("bare", "pages", "idle", "create", "reserve", "busy", "training")
    readings: Readings = {name: [] for name in names}
    for extent in (EXTENT, FIXED_PAGE):
        pair.prepare_bare(extent)
    pair.create()
    with progress("handover", rounds) as advance:
        for _ in range(rounds):
            readings["create"].append(pair.create())
            hog.ask({"do": "give"})
            readings["reserve"].append(pair.take())
            pair.give()
            pair.refill()
            readings["bare"].append(pair.bare(EXTENT))
            readings["pages"].append(pair.bare(FIXED_PAGE))
            readings["idle"].append(pair.take())
            pair.give()
            pair.refill()
            advance(1)
    few = max(3, rounds // 10)
    with progress("a victim that holds the GIL", few) as advance:
        for _ in range(few):
            hog.ask({"do": "hold_gil", "seconds": GIL_HELD})
            time.sleep(0.1)
            readings["busy"].append(pair.take())
            pair.give()
            pair.refill()
            advance(1)
    hog.ask({"do": "train"})
    time.sleep(3)
    with progress("a victim that trains", rounds) as advance:
        for _ in range(rounds):
            readings["training"].append(pair.take())
            pair.give()
            time.sleep(0.02)
            advance(1)
    hog.ask({"do": "trained"})
    return readings


def tables(size: int, raw: Readings) -> list[Table]:
    amount = tem.format_bytes(size)
    rows = [
        ("idle", "from an idle process that holds the device", "bare"),
        ("reserve", "from the free reserve", "create"),
        ("busy", f"from one that holds the GIL for {GIL_HELD} s", None),
        ("training", "from one that trains flat out", None),
    ]

    def row(name: str, what: str, floor: str | None) -> list[str]:
        values = raw[name]
        times = [time_of(summarise(values)), f"{percentile(values, 99) / MILLISECOND:.2f} ms"]
        if floor is None:
            return [what, *times, "-", "-"]
        return [
            what,
            *times,
            time_of(summarise(raw[floor])),
            spread(paired_ratio(values, raw[floor])),
        ]

    shown = [row(*each) for each in rows]
    pages = summarise(raw["pages"])
    shown.append(["the bare driver, in fixed pages of 2 MiB", time_of(pages), "-", "-", "-"])
    handed = Table(
        f"{amount} from one process to another",
        ["what", "median", "p99", "bare driver", "ratio"],
        shown,
        "Extents of 64 MiB. Bare: unmap and release there, create and map here, without the message between; "
        "from the reserve: create and map. Ratio: median, round by round, with its quartiles.",
    )
    idle, reserve = paired_ratio(raw["idle"], raw["bare"]), paired_ratio(raw["reserve"], raw["create"])
    worst, training = percentile(raw["idle"], 99) / MILLISECOND, summarise(raw["training"]).median
    targets = [
        target_row("idle process, over the bare handover", f"{idle.median:.2f}", "1.3", idle.median <= 1.3),
        target_row("idle process, p99", f"{worst:.2f} ms", "12 ms", worst <= 12),
        target_row("reserve, over create and map", f"{reserve.median:.2f}", "1.3", reserve.median <= 1.3),
        target_row(
            "training process, median",
            f"{training / MILLISECOND:.2f} ms",
            "10 ms",
            training <= 10 * MILLISECOND,
        ),
    ]
    return [handed, Table("Targets, for 1 GiB on a GPU", TARGET_COLUMNS, targets)]


@click.command()
@backend_option
@size_option("--size", "What is handed over. [default: 1GiB, 256MiB on the host]")
@click.option("--rounds", default=50, show_default=True, type=click.IntRange(3))
@out_option
def main(backend: str, size: int | None, rounds: int, out: Path | None) -> None:
    """Hands memory from one process to another through the broker, beside the bare driver."""
    size = size or (256 << 20 if backend == "host" else 1 << 30)
    with errors_as_messages():
        with Worker("handover_worker", "probe", backend) as probe:
            device: dict[str, Any] = probe.ask({})
        uuid = "HOST" if backend == "host" else device["uuid"]
        capacity = 4 * size + EXTENT if backend == "host" else device["free"] - ASIDE - 2 * size
        options = ["--device", f"{uuid}={capacity}", "--reserve", f"{uuid}=0,0"]
        with broker(options), started("handover_worker", ["hog", "taker"], backend) as workers:
            workers["hog"].ask({"do": "fill"})
            raw = measure(workers["hog"], workers["taker"], size, rounds)
    result = Result(
        "bench_handover",
        command_line("bench_handover", sys.argv[1:]),
        machine.facts(gpu_uuid=None if backend == "host" else uuid),
        {"size": size, "rounds": rounds, "capacity": capacity},
        tables(size, raw),
        raw,
    )
    publish(result, out, backend)


if __name__ == "__main__":
    main()
