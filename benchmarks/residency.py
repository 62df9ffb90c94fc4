"""Bytes mapped and bytes live over simulated time, and the figures that sum them up."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Figures(msgspec.Struct, frozen=True):
    """Figures over the whole of a run, weighted by time. Bytes are bytes; a ratio is mapped over live."""

    mean_live: float
    mean_mapped: float
    peak_live: int
    peak_mapped: int
    peak_excess: int  # the most that was ever mapped beyond what was live
    fragmentation: float  # byte-seconds mapped over byte-seconds live
    fragmentation_p95: float  # exceeded for 5% of the time in which anything was live


class Curve(msgspec.Struct):
    """A run in a few hundred points: means of live and mapped bytes, second by second of `seconds`."""

    seconds: list[float]
    live: list[float]
    mapped: list[float]


class Residency:
    """Samples of a run. A sample holds until the next one."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._live: list[int] = []
        self._mapped: list[int] = []

    def add(self, seconds: float, live: int, mapped: int) -> None:
        """Adds a sample; `seconds` must not go back."""
        self._seconds.append(seconds)
        self._live.append(live)
        self._mapped.append(mapped)

    def figures(self) -> Figures:
        """Sums the run up; it must hold two samples at different times."""
        spans = self._spans()
        total = sum(spans)
        live_seconds = sum(live * span for live, span in zip(self._live, spans, strict=True))
        mapped_seconds = sum(mapped * span for mapped, span in zip(self._mapped, spans, strict=True))
        ratios = [
            (mapped / live, span)
            for live, mapped, span in zip(self._live, self._mapped, spans, strict=True)
            if live > 0 and span > 0
        ]
        return Figures(
            mean_live=live_seconds / total,
            mean_mapped=mapped_seconds / total,
            peak_live=max(self._live),
            peak_mapped=max(self._mapped),
            peak_excess=max(mapped - live for live, mapped in zip(self._live, self._mapped, strict=True)),
            fragmentation=mapped_seconds / live_seconds,
            fragmentation_p95=_weighted_percentile(ratios, 0.95),
        )

    def curve(self, points: int = 600) -> Curve:
        """Means over `points` equal stretches of the run."""
        spans = self._spans()
        start = self._seconds[0]
        width = (self._seconds[-1] - start) / points
        live, mapped = [0.0] * points, [0.0] * points
        for at, span, live_bytes, mapped_bytes in zip(
            self._seconds, spans, self._live, self._mapped, strict=True
        ):
            end = at + span
            bucket = min(int((at - start) / width), points - 1)
            while span > 0:
                edge = start + (bucket + 1) * width if bucket < points - 1 else end
                part = min(edge, end) - at
                if part > 0:
                    live[bucket] += live_bytes * part / width
                    mapped[bucket] += mapped_bytes * part / width
                if edge >= end:
                    break
                at, bucket = edge, bucket + 1
        return Curve([start + (bucket + 0.5) * width for bucket in range(points)], live, mapped)

    def _spans(self) -> list[float]:
        following = [*self._seconds[1:], self._seconds[-1]]
        return [after - before for before, after in zip(self._seconds, following, strict=True)]


def _weighted_percentile(values: Sequence[tuple[float, float]], fraction: float) -> float:
    """The smallest value that at least `fraction` of the weight does not exceed."""
    ordered = sorted(values)
    target = fraction * sum(weight for _, weight in ordered)
    reached = 0.0
    for value, weight in ordered:
        reached += weight
        if reached >= target:
            return value
    return ordered[-1][0]
