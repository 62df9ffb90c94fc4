"""`tem reclaim`."""

from __future__ import annotations

import click

import torch_elastic_mem as tem
from torch_elastic_mem.cli.broker import NOT_ALL, connect, require
from torch_elastic_mem.cli.sizes import Bytes


@click.command()
@click.argument("name")
@click.argument("count", metavar="BYTES", type=Bytes())
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, max=3600),
    default=10.0,
    show_default=True,
    help="Seconds that the accounts have for it.",
)
@click.pass_context
def reclaim(ctx: click.Context, name: str, count: int, timeout: float) -> None:
    """Have accounts give memory back, up every rung that they have.

    NAME is an account's, NAME/PID for that of one process, or a class. What comes is free for whoever asks
    next. The exit code is 1 if less came than was asked, or there is no such account.
    """
    with connect() as client:
        require(ctx, client.state(), name)
        came = client.reclaim(name, count, timeout)
    click.echo(f"{tem.format_bytes(came)} came of {tem.format_bytes(count)} asked")
    if came < count:
        ctx.exit(NOT_ALL)
