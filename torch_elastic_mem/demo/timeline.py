"""The picture of a run: who held what, and what both tenants got done with it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch_elastic_mem.demo.sample import History, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAINING, _SERVING, _YIELD, _STILL, _GRID = "#3b6fb6", "#e0902f", "#b3261e", "#d9dce2", "#c9ced6"
_TRAINING_IDLE, _SERVING_IDLE = "#a9c1e2", "#f3cf9f"
_RATE_SECONDS = 0.75  # to either side of the moment whose rate is drawn


def draw_timeline(history: History, device: str, path: Path) -> None:
    """Draws a history as a PNG at `path`."""
    # matplotlib takes half a second to import, and nothing before this needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    memory, training, serving = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    samples = history.samples
    _draw_memory(memory, history)
    _draw_rate(training, samples, lambda sample: sample.progress, _TRAINING, "training\nsteps/s")
    _draw_rate(serving, samples, lambda sample: sample.tokens, _SERVING, "serving\ntokens/s")
    _shade_standstill(training, samples)
    serving.set_xlabel("seconds")
    serving.set_xlim(0, samples[-1].at if samples else 1)
    figure.suptitle(
        f"One memory, two tenants ({device}): training yields to bursts, and takes its memory back"
    )
    figure.savefig(path, dpi=110)


def _draw_memory(axes: Axes, history: History) -> None:
    unit, name = (1 << 30, "GiB") if history.capacity >= 4 << 30 else (1 << 20, "MiB")
    samples = history.samples
    axes.stackplot(
        [sample.at for sample in samples],
        [(sample.training - sample.training_idle) / unit for sample in samples],
        [sample.training_idle / unit for sample in samples],
        [(sample.serving - sample.serving_idle) / unit for sample in samples],
        [sample.serving_idle / unit for sample in samples],
        colors=[_TRAINING, _TRAINING_IDLE, _SERVING, _SERVING_IDLE],
        labels=["training", "training, idle", "serving", "serving, idle"],
        linewidth=0,
    )
    top = history.capacity / unit
    axes.axhline(top, color="black", linewidth=1.5, linestyle="--", label="capacity")
    marks = [history.seconds(record.start_ns) for record in history.yields]
    if marks:
        label = f"training yields ({len(marks)})"
        heights = [top * 1.04] * len(marks)
        axes.plot(marks, heights, linestyle="none", marker="v", markersize=7, color=_YIELD, label=label)
    axes.set_ylim(0, top * 1.1)
    axes.set_ylabel(f"{name} held")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=6, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rate(
    axes: Axes, samples: list[Sample], count: Callable[[Sample], float], color: str, label: str
) -> None:
    at = [sample.at for sample in samples]
    rates = []
    for moment in at:
        first = samples[bisect_left(at, moment - _RATE_SECONDS)]
        last = samples[bisect_right(at, moment + _RATE_SECONDS) - 1]
        rates.append((count(last) - count(first)) / max(last.at - first.at, 1e-9))
    axes.fill_between(at, rates, color=color, alpha=0.3, linewidth=0)
    axes.plot(at, rates, color=color, linewidth=1.5)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _shade_standstill(axes: Axes, samples: list[Sample]) -> None:
    begin: float | None = None
    for sample in samples:
        if sample.state == "waiting":
            begin = sample.at if begin is None else begin
        elif begin is not None:
            axes.axvspan(begin, sample.at, color=_STILL, linewidth=0, zorder=0)
            middle, top = (begin + sample.at) / 2, 0.95 * axes.get_ylim()[1]
            axes.text(middle, top, "stands still", ha="center", va="top", clip_on=True)
            begin = None
