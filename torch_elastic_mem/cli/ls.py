"""`tem ls`."""

from __future__ import annotations

import click

from torch_elastic_mem.cli.broker import NOT_ALL, connect, echo_json


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the accounts of each device as JSON.")
@click.pass_context
def ls(ctx: click.Context, as_json: bool) -> None:
    """List the accounts of every process, the highest class first.

    The exit code is 1 if there are none.
    """
    from torch_elastic_mem.screen.cells import account_cells, aligned, blocks, title

    with connect() as client:
        state = client.state()
    if as_json:
        echo_json({device.uuid: device.accounts for device in state.devices})
    for device in state.devices:
        if device.accounts and not as_json:
            click.echo(title(device))
            for line in aligned([account_cells(account) for account in device.accounts]):
                click.echo(f"  {line}")
            for line in filter(None, map(blocks, device.accounts)):
                click.echo(f"  {line}")
    if not any(device.accounts for device in state.devices):
        click.echo("tem: no process has an account", err=True)
        ctx.exit(NOT_ALL)
