"""`tem priority`."""

from __future__ import annotations

import click

from torch_elastic_mem.cli.broker import connect, require


@click.command()
@click.argument("name")
@click.argument("class_name", metavar="CLASS")
@click.pass_context
def priority(ctx: click.Context, name: str, class_name: str) -> None:
    """Move accounts to another class while they run.

    NAME is an account's, NAME/PID for that of one process, or a class. CLASS is idle, training, serving or
    critical. The exit code is 1 if there is no such account.
    """
    from torch_elastic_mem.screen.cells import count

    with connect() as client:
        require(ctx, client.state(), name)
        changed = client.set_priority(name, class_name)
        click.echo(f"{count(changed, 'account')} moved to {class_name}")
