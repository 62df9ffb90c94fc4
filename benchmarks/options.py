"""Command-line options that the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click

import torch_elastic_mem as tem
from benchmarks.compiler import BuildError
from benchmarks.floor import FloorError
from benchmarks.snapshots import SnapshotError
from benchmarks.traces import TraceError
from benchmarks.worker import WorkerError

Command = TypeVar("Command", bound=Callable[..., object])


def size_option(name: str, text: str) -> Callable[[Command], Command]:
    """An option that takes a size such as 4GiB and gives bytes, or None when it is left out."""

    def parse(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
        try:
            return None if value is None else tem.parse_bytes(value)
        except tem.InvalidArgument as error:
            raise click.BadParameter(str(error)) from error

    return click.option(name, callback=parse, metavar="SIZE", help=text)


def backend_option(command: Command) -> Command:
    """--backend, as tem.Arena takes it."""
    text = "host, cuda, or cuda:1."
    return click.option("--backend", default="host", show_default=True, help=text)(command)


def out_option(command: Command) -> Command:
    """--out or --json, the file of the result."""
    path = click.Path(path_type=Path, dir_okay=False)
    text = "Where the JSON goes. [default: in benchmarks/results]"
    return click.option("--out", "--json", "out", type=path, help=text)(command)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Shows what a user can put right as one line: no driver, no compiler, a file that is no trace."""
    try:
        yield
    except (tem.TemError, BuildError, FloorError, TraceError, SnapshotError, WorkerError) as error:
        raise click.ClickException(str(error)) from error
