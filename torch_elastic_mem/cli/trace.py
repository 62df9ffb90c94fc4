"""`tem trace`."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

import torch_elastic_mem as tem
from torch_elastic_mem.cli.broker import NOT_ALL, connect


@click.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write instead of the standard output.",
)
@click.option("--since", type=click.IntRange(min=0), default=0, help="Only events after this number.")
@click.pass_context
def trace(ctx: click.Context, out: Path | None, since: int) -> None:
    """Write what moved memory as a trace that ui.perfetto.dev opens.

    A track for each account, an arrow from who gave to who was given, and the leased bytes as counters. It
    goes as far back as the broker remembers: 65,536 events. The exit code is 1 if nothing has happened.
    """
    from torch_elastic_mem.observe.trace import chrome_trace

    with connect() as client:
        events = list(client.events(since))
        made = msgspec.json.encode(chrome_trace(events, client.state()))
    if out:
        try:
            out.write_bytes(made)
        except OSError as error:
            raise tem.TemError(f"{out} cannot be written: {error.strerror}; name another file") from None
    else:
        click.echo(made)
    if not events:
        click.echo("tem: nothing has happened since", err=True)
        ctx.exit(NOT_ALL)
