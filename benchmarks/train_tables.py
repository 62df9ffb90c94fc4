"""The tables of bench_train: speed, memory and losses of each contender, and a training that yields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch_elastic_mem as tem
from benchmarks.contenders import EXPANDABLE, NATIVE, OURS
from benchmarks.figures import spread
from benchmarks.results import TARGET_COLUMNS, Table, target_row
from benchmarks.timing import paired_ratio, percentile, summarise

SPEED_TARGET = 0.99
MEMORY_TARGET = 1.0
DRIP_TARGET = 0.95
DRIPPED = "ours, yielding"

Answers = Mapping[str, Sequence[Mapping[str, Any]]]


def tables(
    models: Mapping[str, Answers], units: Mapping[str, str], drips: Mapping[str, str], notes: Sequence[str]
) -> list[Table]:
    """What all models show.

    Args:
        models: for each, what each contender answered round by round.
        units: what each model's samples are called.
        drips: of models that were trained under a drip, what that was.
        notes: failures, said below the first table.
    """
    rows = [row for model, answers in models.items() for row in _contenders(model, units[model], answers)]
    main = Table(
        "Training",
        [
            "model, allocator",
            "step",
            "throughput",
            "over native",
            "peak reserved",
            "peak allocated",
            "retries",
            "losses",
        ],
        rows,
        " ".join(
            [
                "Medians of rounds. over native: throughput, median of the ratios round by round, with its "
                "quartiles: above 1 is faster. retries: times the allocator emptied its cache to go on. "
                "losses: whether every loss of every round has native's bits.",
                *notes,
            ]
        ),
    )
    found = [main]
    dripped = [_drip_row(model, drips[model], models[model]) for model in drips if DRIPPED in models[model]]
    if dripped:
        found.append(
            Table(
                "Training that yields",
                [
                    "model, drip",
                    "throughput over undisturbed",
                    "demands met / refused",
                    "yields",
                    "yielded",
                    "demand p50 / p99",
                    "yield p50 / p99",
                ],
                dripped,
                "A demand that finds the training at its peak is refused. demand: until its memory is "
                "mapped; yield: the part of it in which the training gave.",
            )
        )
    return [*found, _targets(models, drips)]


def _contenders(model: str, unit: str, answers: Answers) -> list[list[str]]:
    rows = []
    for name, rounds in answers.items():
        over = _speed(answers, name, NATIVE) if name != NATIVE else None
        rows.append(
            [
                f"{model}, {name}",
                f"{summarise([turn['step_ms'] for turn in rounds]).median:.1f} ms",
                f"{summarise([turn['per_second'] for turn in rounds]).median:,.0f} {unit}/s",
                spread(over) if over else "",
                _size(rounds, "reserved"),
                _size(rounds, "allocated"),
                str(max(turn["retries"] for turn in rounds)),
                _losses(answers, name),
            ]
        )
    return rows


def _losses(answers: Answers, name: str) -> str:
    own = {turn["losses"] for turn in answers[name]}
    native = {turn["losses"] for turn in answers.get(NATIVE, ())}
    if len(native) != 1:
        return "native does not repeat" if native else "no native"
    if name == NATIVE:
        return "repeat"
    return "equal" if own == native else "DIFFER"


def _drip_row(model: str, drip: str, answers: Answers) -> list[str]:
    figures = [turn["drip"] for turn in answers[DRIPPED]]
    latencies = [latency for one in figures for latency in one["latencies_ms"]]
    yields = [latency for one in figures for latency in one["yields_ms"]]
    over = _speed(answers, DRIPPED, OURS)
    return [
        f"{model}, {drip}",
        spread(over) if over else "",
        f"{sum(one['met'] for one in figures)} / {sum(one['refused'] for one in figures)}",
        str(len(yields)),
        tem.format_bytes(sum(one["yielded"] for one in figures)),
        f"{percentile(latencies, 50):.2f} / {percentile(latencies, 99):.2f} ms",
        f"{percentile(yields, 50):.2f} / {percentile(yields, 99):.2f} ms",
    ]


def _targets(models: Mapping[str, Answers], drips: Mapping[str, str]) -> Table:
    rows = []
    for model, answers in models.items():
        if over := _speed(answers, OURS, NATIVE):
            rows.append(_at_least(f"{model}: throughput over native", over.median, SPEED_TARGET))
        if {OURS, EXPANDABLE} <= set(answers):
            ours, theirs = (_values(answers, name, "reserved") for name in (OURS, EXPANDABLE))
            memory = paired_ratio(ours, theirs)
            what = f"{model}: peak reserved over native with expandable segments"
            met = memory.median <= MEMORY_TARGET
            rows.append(target_row(what, f"{memory.median:.3f}", f"at most {MEMORY_TARGET:g}", met))
        if model in drips and (over := _speed(answers, DRIPPED, OURS)):
            rows.append(_at_least(f"{model}: throughput yielding over undisturbed", over.median, DRIP_TARGET))
            rows.append(_yielded(model, answers[DRIPPED]))
    return Table("Targets", TARGET_COLUMNS, rows)


def _at_least(what: str, ratio: float, least: float) -> list[str]:
    return target_row(what, f"{ratio:.3f}", f"at least {least}", ratio >= least)


def _yielded(model: str, rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """A drip that finds its memory free shows nothing."""
    met = sum(turn["drip"]["met"] for turn in rounds)
    yields = sum(len(turn["drip"]["yields_ms"]) for turn in rounds)
    return target_row(
        f"{model}: demands that were yielded to", f"{yields} of {met}", "most", 2 * yields > met
    )


def _speed(answers: Answers, over: str, under: str) -> Any:
    if over not in answers or under not in answers:
        return None
    return paired_ratio(_values(answers, over, "per_second"), _values(answers, under, "per_second"))


def _values(answers: Answers, name: str, key: str) -> list[float]:
    return [turn[key] for turn in answers[name]]


def _size(rounds: Sequence[Mapping[str, Any]], key: str) -> str:
    return tem.format_bytes(round(summarise([turn[key] for turn in rounds]).median))
