"""The picture of a run: memory over time, and how much of it is held for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a benchmark machine has no display

import matplotlib.pyplot as plt

from benchmarks.residency import Curve

_GIB = float(1 << 30)


def draw(curves: Mapping[str, Curve], title: str, path: Path, axis: str = "simulated seconds") -> None:
    """Writes a PNG of two panels: bytes live and mapped, and bytes mapped beyond what is live.

    Args:
        curves: name of each cache to its run; live bytes are drawn from the first.
        title: what was served, and where.
        path: where the PNG goes.
        axis: what time is.
    """
    figure, (memory, excess) = plt.subplots(2, 1, figsize=(11, 7), sharex=True, layout="constrained")
    figure.suptitle(title)
    first = next(iter(curves.values()))
    memory.fill_between(first.seconds, [b / _GIB for b in first.live], color="0.85", label="live")
    for name, curve in curves.items():
        memory.plot(curve.seconds, [b / _GIB for b in curve.mapped], linewidth=1, label=name)
        beyond = [(m - b) / _GIB for m, b in zip(curve.mapped, curve.live, strict=True)]
        excess.plot(curve.seconds, beyond, linewidth=1, label=name)
    memory.set_ylabel("mapped, GiB")
    excess.set_ylabel("mapped beyond live, GiB")
    excess.set_xlabel(axis)
    memory.legend(loc="upper right", fontsize="small")
    for panel in (memory, excess):
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
