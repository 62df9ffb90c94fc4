"""What the commands that speak with a broker share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch_elastic_mem.broker.control import ControlClient
    from torch_elastic_mem.broker.state import AccountState, MachineState

# Exit code of a command that found nothing, or could not have all that was asked.
NOT_ALL = 1


def connect() -> ControlClient:
    """A connection to the broker that this user's processes would find."""
    from torch_elastic_mem.broker.control import ControlClient
    from torch_elastic_mem.broker.paths import Paths, broker_directory

    return ControlClient(Paths(broker_directory(os.environ)).control)


def named(state: MachineState, name: str) -> list[AccountState]:
    """The accounts that a name means: an account's, "name/pid" for those of one process, or a class's."""
    return [
        account
        for device in state.devices
        for account in device.accounts
        if name in (account.name, f"{account.name}/{account.pid}", account.priority)
    ]


def require(ctx: click.Context, state: MachineState, name: str) -> None:
    """Ends the command with `NOT_ALL` where no account is meant, and says which there are."""
    if named(state, name):
        return
    there = sorted({f"{each.name}/{each.pid}" for device in state.devices for each in device.accounts})
    known = f"there are {', '.join(there)}" if there else "there are none"
    from torch_elastic_mem.screen.cells import printable

    click.echo(printable(f"tem: no account '{name}': {known}"), err=True)
    ctx.exit(NOT_ALL)


def echo_json(value: Any) -> None:
    """Prints a value as JSON with indents."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())
