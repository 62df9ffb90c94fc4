"""`tem serve`."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command()
@click.option(
    "--config", type=click.Path(path_type=Path, dir_okay=False), help="File of TOML; read again at SIGHUP."
)
@click.option(
    "--directory", type=click.Path(path_type=Path), help="Where the sockets are.  [TEM_RUNTIME_DIR]"
)
@click.option(
    "--device", multiple=True, metavar="HOST=4GiB", help="Capacity of a device, by UUID, label or HOST."
)
@click.option(
    "--reserve", multiple=True, metavar="HOST=64MiB,256MiB", help="The two marks of a device's reserve."
)
@click.option("--metrics", type=click.IntRange(1, 65535), metavar="PORT", help="Serve metrics at this port.")
@click.option("--log", metavar="FILE", help="Write the log there, and not to the standard error.")
@click.option(
    "--idle-exit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="End after having had no tenant for so long.",
)
@click.option("--verbose", is_flag=True, help="Log more.")
def serve(
    config: Path | None,
    directory: Path | None,
    device: tuple[str, ...],
    reserve: tuple[str, ...],
    metrics: int | None,
    log: str | None,
    idle_exit: float | None,
    verbose: bool,
) -> None:
    """Share the memory of this machine among its processes, until stopped.

    Options go over what the configuration says. Prints a line when tenants can connect.
    """
    import asyncio

    from torch_elastic_mem.broker import daemon, idle
    from torch_elastic_mem.broker.config import Config, merge, read_table
    from torch_elastic_mem.broker.control_server import control
    from torch_elastic_mem.broker.paths import default_directory
    from torch_elastic_mem.broker.shares_server import serve_shares
    from torch_elastic_mem.errors import TemError
    from torch_elastic_mem.observe.exporter import metrics as metrics_service

    def read() -> Config:
        table = {} if config is None else read_table(config)
        return merge(table, capacities=device, reserves=reserve, metrics=metrics, log=log)

    def ready(running: daemon.Running) -> None:
        click.echo(f"tem serve: ready at {running.paths.tenants}")

    where = directory or default_directory(os.environ)
    try:
        services: list[daemon.Service] = [control, serve_shares, metrics_service]
        if idle_exit is not None:
            services.append(idle.idle_exit(idle_exit))
        asyncio.run(daemon.run(read, where.absolute(), services=services, ready=ready, verbose=verbose))
    except OSError as error:
        raise TemError(f"cannot serve in {where}: {error}") from None
