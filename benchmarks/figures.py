"""How figures are written in tables, the same in every benchmark."""

from __future__ import annotations

from benchmarks.timing import Summary


def spread(ratio: Summary) -> str:
    """A ratio: its median, and its quartiles."""
    return f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})"


def time_of(nanoseconds: Summary) -> str:
    """The median of times, in a unit that suits it."""
    value = nanoseconds.median
    if value < 10_000:
        return f"{value:.0f} ns"
    return f"{value / 1000:.1f} us" if value < 1_000_000 else f"{value / 1_000_000:.2f} ms"
