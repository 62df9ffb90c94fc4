"""The tables of bench_handover: readings into percentiles, ratios to the floor, and targets met or missed."""

from __future__ import annotations

from collections.abc import Mapping

import torch_elastic_mem as tem
from benchmarks.figures import spread, time_of
from benchmarks.results import TARGET_COLUMNS, Table, target_row
from benchmarks.timing import Summary, paired_ratio, percentile, summarise

Readings = dict[str, list[float]]

IDLE = "from an idle process that holds the whole device"
NO_GIL = "the same, and it holds its GIL in a C call meanwhile"
TRAINING = "from the cache of a process that trains flat out"
RESERVE = "free on the device; driver: create and map"

_RATIO = 1.3
_P99_MS = 12.0
_TRAINING_MS = 10.0


def tables(size: int, raw: Mapping[str, Readings]) -> list[Table]:
    """The handovers beside their floors, and the targets."""
    amount = tem.format_bytes(size)
    rows = [_row(what, raw[what]) for what in (IDLE, NO_GIL, TRAINING, RESERVE)]
    asks = raw["asks"]["yield"]
    steps = raw[TRAINING]["steps a second"][0]
    note = (
        "Driver: the same bytes between two processes without a broker, in extents of 64 MiB and in fixed "
        "pages of 2 MiB: one unmaps and releases, tells the other by a socket, and that creates, maps and "
        "makes accessible. Ours: from the call in the asking process until the memory is accessible there. "
        "Times are medians but for p99; ratio: median of ours over the driver with 64 MiB, round by round, "
        f"with its quartiles. From an ask of the broker's to its last answer: {time_of(summarise(asks))}. "
        f"The training made {steps:.1f} steps a second."
    )
    columns = ["what", "driver", "driver p99", "2 MiB pages", "ours", "ours p99", "ratio", "readings"]
    return [
        Table(f"{amount} from one process to another", columns, rows, note),
        Table("Targets", TARGET_COLUMNS, _targets(raw)),
    ]


def _row(what: str, readings: Readings) -> list[str]:
    floor, ours = readings["floor"], readings["take"]
    return [
        what,
        time_of(summarise(floor)),
        _p99(floor),
        time_of(summarise(readings["pages"])),
        time_of(summarise(ours)),
        _p99(ours),
        spread(paired_ratio(ours, floor)),
        str(len(ours)),
    ]


def _p99(readings: list[float]) -> str:
    value = percentile(readings, 99)
    return time_of(Summary(value, value, value, len(readings)))


def _targets(raw: Mapping[str, Readings]) -> list[list[str]]:
    idle = paired_ratio(raw[IDLE]["take"], raw[IDLE]["floor"]).median
    reserve = paired_ratio(raw[RESERVE]["take"], raw[RESERVE]["floor"]).median
    p99 = percentile(raw[IDLE]["take"], 99) / 1e6
    training = summarise(raw[TRAINING]["take"]).median / 1e6
    return [
        target_row(f"{IDLE}: p50 over the driver's", f"{idle:.2f}", f"at most {_RATIO}", idle <= _RATIO),
        target_row("the same: p99", f"{p99:.2f} ms", f"at most {_P99_MS:g} ms", p99 <= _P99_MS),
        target_row(
            "free on the device, over create and map",
            f"{reserve:.2f}",
            f"at most {_RATIO}",
            reserve <= _RATIO,
        ),
        target_row(
            f"{TRAINING}: p50", f"{training:.2f} ms", f"at most {_TRAINING_MS:g} ms", training <= _TRAINING_MS
        ),
    ]
