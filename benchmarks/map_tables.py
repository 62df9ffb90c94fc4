"""The tables of bench_map: readings into medians, ratios to the floor, and targets met or missed."""

from __future__ import annotations

from collections.abc import Mapping

import torch_elastic_mem as tem
from benchmarks.figures import spread, time_of
from benchmarks.results import TARGET_COLUMNS, Table, target_row
from benchmarks.timing import Summary, paired_ratio, summarise

Readings = dict[str, list[float]]


def tables(size: int, raw: Mapping[str, Readings]) -> list[Table]:
    """The tables of a run: by extent size, from a warm reserve, ensure, and the targets."""
    amount = tem.format_bytes(size)
    by_extent = Table(
        f"Take {amount} from nothing, and give it back",
        ["extents", "driver take", "arena take", "ratio", "driver give", "arena give", "ratio"],
        [_by_extent_row(name.removeprefix("cold "), raw[name]) for name in raw if name.startswith("cold ")],
        "Medians; ratio: median of arena over driver, round by round, with its quartiles. The arena's own "
        "choice of extents stands beside the driver with 64 MiB extents.",
    )
    warm, handover = raw["warm"], raw["handover"]
    fast = Table(
        f"{amount} from a warm reserve, and from a lower class",
        ["what", "driver", "arena", "ratio"],
        [
            _pair_row(
                "take from a warm reserve; driver: map 64 MiB extents it holds",
                warm,
                "floor_take_pooled",
                "take",
            ),
            _pair_row(
                "give back to the reserve; driver: unmap 64 MiB extents", warm, "floor_give_pooled", "give"
            ),
            _pair_row(
                "take from a warm reserve; driver: map 2 MiB pages it holds",
                warm,
                "pages_take_pooled",
                "take",
            ),
            _pair_row(
                "take from a warm reserve; driver: create and map 2 MiB pages", warm, "pages_take", "take"
            ),
            _pair_row(
                "yield between accounts; driver: unmap here, map there", handover, "floor_handover", "yield"
            ),
        ],
    )
    python, core = raw["ensure python"], raw["ensure core"]
    ensured = Table(
        "ensure() of blocks that are resident already",
        ["blocks", "in C++", "from Python"],
        [[count, time_of(summarise(core[count])), time_of(summarise(python[count]))] for count in core],
    )
    return [by_extent, fast, ensured, _targets(amount, raw)]


def _targets(amount: str, raw: Mapping[str, Readings]) -> Table:
    warm, handover = raw["warm"], raw["handover"]
    take = paired_ratio(warm["take"], warm["floor_take_pooled"])
    faster_pooled = paired_ratio(warm["pages_take_pooled"], warm["take"])
    faster = paired_ratio(warm["pages_take"], warm["take"])
    given = paired_ratio(handover["yield"], handover["floor_handover"])
    core = max(summarise(readings).median for readings in raw["ensure core"].values())
    python = max(summarise(readings).median for readings in raw["ensure python"].values())
    return Table(
        "Targets",
        TARGET_COLUMNS,
        [
            _ratio_target(f"take {amount} from a warm reserve, over mapping held 64 MiB extents", take, 1.15),
            _speed_target("the same, against creating and mapping 2 MiB pages", faster, 10),
            _speed_target("the same, against mapping held 2 MiB pages", faster_pooled, 10),
            _ratio_target(f"yield of {amount} between accounts, over bare unmap and map", given, 1.15),
            target_row(
                "ensure of up to 64 resident blocks, in C++", f"{core:.0f} ns", "under 1000 ns", core < 1000
            ),
            target_row("the same from Python", f"{python:.0f} ns", "under 3000 ns", python < 3000),
        ],
    )


def _by_extent_row(name: str, readings: Readings) -> list[str]:
    take, give = (
        _pair_row(name, readings, "floor_take", "take"),
        _pair_row(name, readings, "floor_give", "give"),
    )
    return take + give[1:]


def _pair_row(what: str, readings: Readings, floor: str, ours: str) -> list[str]:
    ratio = paired_ratio(readings[ours], readings[floor])
    return [what, time_of(summarise(readings[floor])), time_of(summarise(readings[ours])), spread(ratio)]


def _ratio_target(what: str, ratio: Summary, most: float) -> list[str]:
    return target_row(what, f"{ratio.median:.3f}", f"at most {most}", ratio.median <= most)


def _speed_target(what: str, ratio: Summary, least: float) -> list[str]:
    return target_row(what, f"{ratio.median:.1f} times faster", f"at least {least:g}", ratio.median >= least)
