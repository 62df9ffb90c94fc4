"""The tables of bench_multi."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch_elastic_mem as tem
from benchmarks.results import TARGET_COLUMNS, Table, target_row
from benchmarks.timing import percentile, tail_ratio
from benchmarks.vllm.engine import CONTROL, KVCACHED, OURS

SLOWER_TARGET = 1.02
FACTOR_TARGET = 10.0
# A fixed split is saturated where requests have held so much of an engine's cache: others wait for it then.
FULL = 0.95

# By contender, what its engines made of a run, in all rounds: a list of an answer for each engine and round.
Answers = Mapping[str, Sequence[Mapping[str, Any]]]


class Figures:
    """What one contender made of one pattern at one peak. Times are in seconds."""

    def __init__(self, served: Sequence[Mapping[str, Any]]) -> None:
        seen = [each["seen"] for each in served]
        self.ttft: list[float] = list(chain.from_iterable(each["ttft"] for each in seen))
        self.tpot = list(chain.from_iterable(each["tpot"] for each in seen))
        self.tokens = list(chain.from_iterable(each["tokens"] for each in seen))
        # Only percentiles are kept of each engine, so the worst engine's stand for all.
        self.itl_p99 = max(each["itl"][99] for each in seen)
        self.output = sum(each["output_per_second"] for each in seen)
        self.preempted = sum(each["preempted"] for each in served)
        # Older results do not say.
        self.moved = (
            sum(each["moved"] for each in served) if all("moved" in each for each in served) else None
        )
        self.failed = sum(each["short"] for each in seen)
        self.most = max(each["most_bytes"] for each in served)
        self.full = any(each["most_bytes"] >= FULL * each["cache_bytes"] for each in served)

    @property
    def mean(self) -> float:
        """Of the times to the first token."""
        return sum(self.ttft) / max(1, len(self.ttft))

    @property
    def p99(self) -> float:
        """Of the times to the first token."""
        return percentile(self.ttft, 99)


def tables(runs: Mapping[str, Answers], engines: int, rounds: int, note: str) -> list[Table]:
    """A table a pattern, and the targets.

    Args:
        runs: by what is served: a pattern at a peak.
        engines: of a contender.
        rounds: how often each was served.
        note: which split was served, and what failed.
    """
    figures = {
        what: {name: Figures(served) for name, served in answers.items() if served}
        for what, answers in runs.items()
    }
    columns = [
        "load, engines",
        "requests",
        "TTFT mean / p50 / p99",
        "mean, p99 over static",
        "TPOT mean / p99",
        "ITL p99",
        "output",
        "most of one cache",
        "preempted / failed",
        "blocks moved",
        "tokens",
    ]
    rows = [row for what, found in figures.items() for row in _rows(what, found, rounds)]
    said = (
        f"{engines} engines on one device; a rate is one engine's peak. over static: over the best static "
        "split in that row; under 1 is faster. most of one cache: the most that the requests of one engine "
        "held. tokens: requests whose tokens are those of the first row of the same load; in low precision "
        "they depend on which requests share a step."
    )
    return [
        Table("Three models on one device", columns, rows, " ".join([said, note]).strip()),
        _targets(figures),
    ]


def _rows(what: str, found: Mapping[str, Figures], rounds: int) -> list[list[str]]:
    static = _best_static(found)
    first = next(iter(found.values()))
    return [
        [
            f"{what}, {name}",
            f"{len(each.tokens):,}",
            f"{_ms(each.mean)} / {_ms(percentile(each.ttft, 50))} / {_ms(each.p99)} ms",
            f"{each.mean / static[0].mean:.2f}, {each.p99 / static[1].p99:.2f}" if static else "",
            f"{_ms(sum(each.tpot) / max(1, len(each.tpot)))} / {_ms(percentile(each.tpot, 99))} ms",
            f"{_ms(each.itl_p99)} ms",
            f"{each.output / rounds:,.0f} tokens/s",
            # Its pool counts what it finds free on the device, not what requests hold.
            "" if name == KVCACHED else tem.format_bytes(each.most),
            f"{each.preempted} / {each.failed}",
            "" if each.moved is None else f"{each.moved:,}",
            "" if each is first else _same(each.tokens, first.tokens),
        ]
        for name, each in found.items()
    ]


def _best_static(found: Mapping[str, Figures]) -> tuple[Figures, Figures] | None:
    """Of the splits that with the lowest mean, and that with the lowest p99."""
    static = _static(found)
    if not static:
        return None
    return min(static, key=lambda each: each.mean), min(static, key=lambda each: each.p99)


def _static(found: Mapping[str, Figures]) -> list[Figures]:
    """Of the splits; a second stock fleet is held against the first as others are."""
    return [
        each for name, each in found.items() if name not in (OURS, KVCACHED) and not name.startswith(CONTROL)
    ]


def _targets(figures: Mapping[str, Mapping[str, Figures]]) -> Table:
    rows = []
    factors: dict[str, float] = {}
    for what, found in figures.items():
        static, ours = _best_static(found), found.get(OURS)
        if static is None or ours is None:
            continue
        mean = ours.mean / static[0].mean
        p99 = tail_ratio(ours.ttft, static[1].ttft, 99)
        for name, ratio, shown in (
            ("mean", mean, f"{mean:.3f}"),
            ("p99", p99.median, f"{p99.median:.3f} ({p99.q1:.2f} to {p99.q3:.2f})"),
        ):
            rows.append(
                target_row(
                    f"{what}: TTFT {name} over static",
                    shown,
                    f"at most {SLOWER_TARGET}",
                    ratio <= SLOWER_TARGET,
                )
            )
        if all(each.full for each in _static(found)):
            factors[what] = 1 / p99.median
            rows.append(
                target_row(
                    f"{what}, where static is full: TTFT p99 of static over ours",
                    f"{factors[what]:.1f}",
                    f"at least {FACTOR_TARGET:g}",
                    factors[what] >= FACTOR_TARGET,
                )
            )
    best = max(factors, key=lambda what: factors[what], default=None)
    said = (
        f"Best factor where a static split is full: {factors[best]:.1f}, {best}."
        if best
        else "No static split was full in any of these."
    )
    said += " In brackets: quartiles of what as many other such requests would have given, by a bootstrap."
    return Table("Targets", TARGET_COLUMNS, rows, said if rows else "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def _same(tokens: Sequence[str], others: Sequence[str]) -> str:
    # One that failed half-way has served fewer rounds.
    return f"{sum(a == b for a, b in zip(tokens, others, strict=False))} of {len(tokens)}"
