"""`tem config`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import msgspec

from torch_elastic_mem.cli.broker import echo_json
from torch_elastic_mem.cli.serve import serve

# A broker's configuration is what its file, its environment and its options say.
OPTIONS = [option for option in serve.params if option.name not in ("idle_exit", "verbose")]


@click.command(params=[*OPTIONS])
@click.option("--show", is_flag=True, help="Print every value, and where it comes from.")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def config(
    config: Path | None,
    directory: Path | None,
    device: tuple[str, ...],
    reserve: tuple[str, ...],
    show: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Check a broker's configuration, or show it.

    The options are those that `tem serve` would be given. Something unknown or impossible is an error that
    names the place.
    """
    from torch_elastic_mem.observe.effective import effective
    from torch_elastic_mem.screen.cells import printable

    settings = effective(os.environ, config, directory, capacities=device, reserves=reserve, **options)
    if as_json:
        echo_json(settings)
    elif show:
        width = max(len(setting.key) for setting in settings)
        for setting in settings:
            value = "none" if setting.value is None else msgspec.json.encode(setting.value).decode()
            source = f"{setting.source} {setting.where}".strip()
            click.echo(printable(f"{setting.key:{width}}  {value}  ({source})"))
