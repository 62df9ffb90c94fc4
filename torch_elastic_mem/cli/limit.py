"""`tem limit`."""

from __future__ import annotations

import click

from torch_elastic_mem.cli.broker import connect, named, require
from torch_elastic_mem.cli.sizes import Bytes


class BytesOrNone(Bytes):
    """A size, or "none" for no limit, which is -1 here: click takes None for an option that is not there."""

    name = "size or none"

    def convert(self, value: int | str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads a size or "none", or fails with the usage."""
        return -1 if value in ("none", -1) else super().convert(value, param, ctx)


@click.command()
@click.argument("name")
@click.option("--min", type=Bytes(), help="Never reclaimed, and promised.")
@click.option("--low", type=Bytes(), help="Reclaimed only when nothing else is left.")
@click.option("--high", type=BytesOrNone(), help="Above it, the account trims itself.")
@click.option("--max", type=BytesOrNone(), help="Above it, the account is out of memory by itself.")
@click.option("--weight", type=click.FloatRange(min=0, min_open=True), help="Its share of its class.")
@click.option("--device", metavar="UUID", help="On this device only; its label will do.")
@click.pass_context
def limit(ctx: click.Context, /, name: str, device: str | None, **given: float | None) -> None:
    """Change limits of accounts while they run.

    NAME is an account's, NAME/PID for that of one process, or a class. What is not given stays. The exit code
    is 1 if there is no such account.
    """
    limits = {key: None if value == -1 else value for key, value in given.items() if value is not None}
    if not limits:
        raise click.UsageError("give at least one of --min, --low, --high, --max and --weight")
    from torch_elastic_mem.screen.cells import limits as in_words
    from torch_elastic_mem.screen.cells import printable

    with connect() as client:
        require(ctx, client.state(), name)
        client.set_limits(name, limits, device)
        for account in named(client.state(), name):
            click.echo(printable(f"{account.name}/{account.pid}: {in_words(account)}"))
