"""What a person sees while the demo runs: a live picture, a line a second, or nothing."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from torch_elastic_mem.demo.sample import History, Sample
from torch_elastic_mem.demo.scale import Scale
from torch_elastic_mem.demo.worker import Progress
from torch_elastic_mem.units import format_bytes

_LATEST_YIELDS = 5
_LINE_SECONDS = 1.0
_REFRESH = 8

# Account, what it uses and what it holds unused.
_STYLES = {
    "training": ("blue", "dim blue"),
    "serving": ("yellow", "dim yellow"),
    "free": ("green", "green"),
}


class View(Protocol):
    """Shown from one thread; closed once."""

    def opening(self, what: str) -> None:
        """Says what is being started."""

    def begin(self, scale: Scale, device: str) -> None:
        """Says what is about to run."""

    def elastic(self, history: History, sample: Sample) -> None:
        """Shows a moment of the elastic phase."""

    def proofs(self, tasks: list[Progress]) -> None:
        """Shows how far the proofs are."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


class _Pace:
    """Says when it is time to show something again."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


class SilentView:
    """Shows nothing."""

    def opening(self, what: str) -> None:
        pass

    def begin(self, scale: Scale, device: str) -> None:
        pass

    def elastic(self, history: History, sample: Sample) -> None:
        pass

    def proofs(self, tasks: list[Progress]) -> None:
        pass

    def close(self) -> None:
        pass


class PlainView:
    """Prints a line a second, for logs and screen readers."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = _Pace(_LINE_SECONDS)

    def opening(self, what: str) -> None:
        self._console.print(f"starting {what}")

    def begin(self, scale: Scale, device: str) -> None:
        self._console.print(_plan(scale, device))

    def elastic(self, history: History, sample: Sample) -> None:
        if self._pace.due():
            loss = "" if sample.loss is None else f" loss {sample.loss:.3f}"
            last = f" (last {history.yields[-1].duration_ns / 1e6:.1f} ms)" if history.yields else ""
            self._console.print(
                f"{sample.at:5.1f} s  training {format_bytes(sample.training)} ({sample.state}), "
                f"serving {format_bytes(sample.serving)}, free {format_bytes(sample.free)} | "
                f"{sample.steps_per_second:.1f} steps/s{loss} | {sample.tokens_per_second:.0f} tokens/s, "
                f"{sample.running} running, {sample.waiting} waiting | {len(history.yields)} yields{last}"
            )

    def proofs(self, tasks: list[Progress]) -> None:
        if self._pace.due():
            self._console.print(
                "proof: " + ", ".join(f"{task.label} {task.done}/{task.total}" for task in tasks)
            )

    def close(self) -> None:
        pass


class LiveView:
    """Draws one picture in place, eight times a second."""

    def __init__(self, console: Console, seconds: float) -> None:
        self._seconds = seconds
        self._live = Live(console=console, refresh_per_second=_REFRESH, auto_refresh=False)
        self._pace = _Pace(1 / _REFRESH)
        self._phase: RenderableType = ""
        self._tasks: list[Progress] = []
        self._live.start()

    def opening(self, what: str) -> None:
        self._live.console.print(f"starting {what}")

    def begin(self, scale: Scale, device: str) -> None:
        self._live.console.print(_plan(scale, device))

    def elastic(self, history: History, sample: Sample) -> None:
        if self._pace.due():
            width = max(20, self._live.console.width - 8)
            at = min(sample.at, self._seconds)
            self._phase = Panel(
                Group(
                    _bar(sample, history.capacity, width),
                    _legend(sample, history.capacity),
                    "",
                    _tenants(sample),
                    "",
                    _yields(history),
                    "",
                    ProgressBar(self._seconds, at, width=width),
                ),
                title=f"one memory, two tenants   {at:.0f} s of {self._seconds:g} s",
                padding=(1, 2),
            )
            self._live.update(self._phase, refresh=True)

    def proofs(self, tasks: list[Progress]) -> None:
        self._tasks = tasks
        if self._pace.due():
            self._draw_tasks()

    def close(self) -> None:
        if self._tasks:
            self._draw_tasks()
        self._live.stop()

    def _draw_tasks(self) -> None:
        grid = Table.grid(padding=(0, 2))
        for task in self._tasks:
            bar = ProgressBar(max(1, task.total), task.done, width=30)
            grid.add_row(task.label, bar, f"{task.done}/{task.total}")
        proofs = Panel(grid, title="the same again, each alone", padding=(1, 2))
        self._live.update(Group(self._phase, proofs), refresh=True)


def _plan(scale: Scale, device: str) -> str:
    return (
        f"{format_bytes(scale.capacity)} on {device}: training needs {format_bytes(scale.training_peak)}, "
        f"serving's weights {format_bytes(scale.shape.weight_bytes)}, "
        f"a burst of {scale.burst_requests} requests {format_bytes(scale.burst_bytes)}"
    )


def _segments(sample: Sample) -> list[tuple[int, str]]:
    """Bytes and style of each part of the bar, from left to right."""
    training, training_idle = _STYLES["training"]
    serving, serving_idle = _STYLES["serving"]
    return [
        (sample.training - sample.training_idle, training),
        (sample.training_idle, training_idle),
        (sample.free, _STYLES["free"][0]),
        (sample.serving_idle, serving_idle),
        (sample.serving - sample.serving_idle, serving),
    ]


def _bar(sample: Sample, capacity: int, width: int) -> Text:
    bar, reached, drawn = Text(no_wrap=True), 0, 0
    for (size, style), glyph in zip(_segments(sample), "█▓░▓█", strict=True):
        reached += size
        # By where a part ends and not by its size: rounding then never moves the right edge.
        end = min(width, round(width * reached / capacity))
        bar.append(glyph * (end - drawn), style=style)
        drawn = max(drawn, end)
    return bar


def _legend(sample: Sample, capacity: int) -> Text:
    text = Text()
    for name, size in (("training", sample.training), ("free", sample.free), ("serving", sample.serving)):
        text.append(f"{name} {format_bytes(size)}   ", style=_STYLES[name][0])
    text.append(f"of {format_bytes(capacity)}", style="dim")
    return text


def _tenants(sample: Sample) -> Table:
    table = Table.grid(padding=(0, 3))
    loss = "" if sample.loss is None else f"loss {sample.loss:.3f}"
    table.add_row(
        Text("training", style=_STYLES["training"][0]),
        f"{sample.steps_per_second:.1f} steps/s",
        f"{sample.steps} steps",
        loss,
        f"{sample.state}, micro-batches redone: {sample.abandoned}",
    )
    table.add_row(
        Text("serving", style=_STYLES["serving"][0]),
        f"{sample.tokens_per_second:.0f} tokens/s",
        f"{sample.tokens} tokens",
        f"{sample.running} running",
        f"{sample.waiting} waiting",
    )
    return table


def _yields(history: History) -> Table:
    table = Table.grid(padding=(0, 3))
    given = sum(record.given for record in history.yields)
    table.add_row("yields", str(len(history.yields)), format_bytes(given), "", "")
    latest = history.yields[-_LATEST_YIELDS:]
    for record in latest:
        table.add_row(
            "",
            f"{history.seconds(record.start_ns):.1f} s",
            format_bytes(record.given),
            f"by {record.rung}",
            f"in {record.duration_ns / 1e6:.1f} ms",
        )
    for _ in range(_LATEST_YIELDS - len(latest)):
        table.add_row("")
    return table
