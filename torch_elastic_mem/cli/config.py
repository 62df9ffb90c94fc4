"""`tem config`."""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

from torch_elastic_mem.cli.broker import echo_json


@click.command()
@click.option("--show", is_flag=True, help="Print every value, and where it comes from.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="The file that `tem serve` is given.")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def config(show: bool, file: Path | None, as_json: bool) -> None:
    """Check the configuration, or show the one in force.

    Something unknown or impossible in the file is an error that names the place.
    """
    from torch_elastic_mem.observe.effective import effective
    from torch_elastic_mem.screen.cells import printable

    settings = effective(os.environ, file)
    if as_json:
        echo_json(settings)
    elif show:
        width = max(len(setting.key) for setting in settings)
        for setting in settings:
            value = "none" if setting.value is None else msgspec.json.encode(setting.value).decode()
            source = f"{setting.source} {setting.where}".strip()
            click.echo(printable(f"{setting.key:{width}}  {value}  ({source})"))
