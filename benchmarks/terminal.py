"""What a benchmark shows while it runs and when it is done. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import rich.table
from rich.console import Console
from rich.progress import Progress

from benchmarks.results import Result, Table, default_path, save

# Without a terminal there is nothing to redraw: one line now and then shows that a run is alive.
_PLAIN_INTERVAL_S = 5.0
_FILE_WIDTH = 160


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how far a run of `total` steps has come; yields a function to call with the steps just done."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda steps: bar.advance(task, steps)
        return

    done = 0
    last = time.monotonic()

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        if time.monotonic() - last >= _PLAIN_INTERVAL_S:
            last = time.monotonic()
            console.print(f"{label}: {done} of {total}", highlight=False)

    yield advance


@contextmanager
def live() -> Iterator[Callable[[str], None]]:
    """Shows how a run stands that has no steps to count; yields a function to call with a line of text."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
        return

    last = time.monotonic()

    def show(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _PLAIN_INTERVAL_S:
            last = time.monotonic()
            console.print(text, highlight=False, soft_wrap=True)

    yield show


def print_result(result: Result) -> None:
    """Prints the machine and every table of a result."""
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(
        " · ".join(f"{key} {value}" for key, value in result.machine.items()), style="dim", highlight=False
    )
    for table in result.tables:
        console.print(_rich(table))
        if table.note:
            console.print(table.note, style="dim", highlight=False)


def publish(result: Result, out: Path | None, backend: str, failures: Iterable[str] = ()) -> None:
    """Prints a result and saves it, at `out` or in the usual place.

    Raises:
        click.ClickException: there were failures; raised when all else is done.
    """
    print_result(result)
    path = out or default_path(result.benchmark, backend)
    save(result, path)
    click.echo(f"saved {path}")
    if said := "; ".join(failures):
        raise click.ClickException(said)


def _rich(table: Table) -> rich.table.Table:
    shown = rich.table.Table(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown
