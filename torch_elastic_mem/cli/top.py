"""`tem top`."""

from __future__ import annotations

import time

import click

from torch_elastic_mem.cli.broker import connect, echo_json


@click.command()
@click.option("--once", is_flag=True, help="Print one picture and end.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1, max=3600),
    default=1.0,
    show_default=True,
    help="Seconds from one picture to the next.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the state as JSON once, and end.")
def top(once: bool, interval: float, as_json: bool) -> None:
    """Show who holds which device's memory, live.

    A bar for each device: a part for each account, of the colour of its class, then what is free, the reserve
    and what programs outside hold. Below it a row for each account. Ctrl-C ends it.
    """
    with connect() as client:
        if as_json:
            echo_json(client.state())
            return
        from rich.console import Console
        from rich.live import Live

        from torch_elastic_mem.screen.top import picture

        console = Console()
        if once:
            console.print(picture(client.state(), console.width))
            return
        try:
            with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
                while True:
                    live.update(picture(client.state(), console.width), refresh=True)
                    time.sleep(interval)
        except KeyboardInterrupt:
            pass
