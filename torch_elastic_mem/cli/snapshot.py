"""`tem snapshot`."""

from __future__ import annotations

import click

from torch_elastic_mem.cli.broker import connect, echo_json


@click.command()
def snapshot() -> None:
    """Print all that the broker says of itself, as JSON."""
    with connect() as client:
        echo_json(client.state())
