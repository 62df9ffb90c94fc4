"""The tables of bench_alloc: what a pair of allocate and free costs, and how the contenders compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contenders import EXPANDABLE, NATIVE, OURS
from benchmarks.figures import spread, time_of
from benchmarks.results import Table
from benchmarks.timing import paired_ratio, summarise

Readings = Mapping[str, Sequence[float]]
ABSENT = "failed"


def by_case(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """Readings by case and contender, from what workers answered round by round.

    The core's own loop is a contender of the cases it shares with torch's.
    """
    found: dict[str, dict[str, list[float]]] = {}

    def put(case: str, contender: str, nanoseconds: float) -> None:
        found.setdefault(case, {}).setdefault(contender, []).append(nanoseconds)

    for contender, rounds in answers.items():
        for answer in rounds:
            for case, nanoseconds in answer["torch"].items():
                put(f"C++, {case}", contender, nanoseconds)
            for case, nanoseconds in answer.get("core", {}).items():
                put(f"C++, {case}", "core", nanoseconds)
            put("C++, mixed sizes, up to 200 live", contender, answer["mixed"])
            for case, nanoseconds in answer["python"].items():
                put(f"torch.empty, {case}", contender, nanoseconds)
    return found


def cuda_tables(cases: Mapping[str, Readings], failures: Mapping[str, str]) -> list[Table]:
    """One row a case: each contender, and ours over torch's own two."""
    rows = []
    for case, readings in cases.items():
        row = [case, *[_time(readings, name) for name in (NATIVE, EXPANDABLE, OURS)]]
        row += [_ratio(readings, OURS, name) for name in (NATIVE, EXPANDABLE)]
        row.append(_time(readings, "core", absent=""))
        rows.append(row)
    notes = [
        "Medians of a pair; ratio: median of ours over theirs, round by round, with its quartiles: under 1 "
        "is faster. With four threads, a pair of one thread while three others do the same. The last "
        "column is ours without torch in between. In the mixed load a pair frees one of 200 slots and "
        "fills it anew with 512 B to 64 MiB, log-uniform."
    ]
    notes += [f"Failed: {failure}." for failure in failures.values()]
    columns = [
        "what",
        "native",
        "native, expandable",
        "ours",
        "ours over native",
        "over expandable",
        "core alone",
    ]
    return [Table("One pair of allocate and free", columns, rows, " ".join(notes))]


def host_tables(cases: Mapping[str, Readings]) -> list[Table]:
    """One row a case: the core beside this machine's malloc, which takes no memory until it is touched."""
    rows = [
        [case, _time(readings, "malloc"), _time(readings, "core"), _ratio(readings, "core", "malloc")]
        for case, readings in cases.items()
    ]
    note = (
        "Medians of a pair; ratio: median of core over malloc, round by round, with its quartiles. malloc "
        "asks the kernel for the large sizes each time, and gets addresses only."
    )
    return [Table("One pair of allocate and free", ["what", "malloc", "core", "ratio"], rows, note)]


def _time(readings: Readings, name: str, *, absent: str = ABSENT) -> str:
    return time_of(summarise(readings[name])) if name in readings else absent


def _ratio(readings: Readings, over: str, under: str) -> str:
    if over not in readings or under not in readings:
        return ""
    return spread(paired_ratio(readings[over], readings[under]))
