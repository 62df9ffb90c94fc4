"""`tem run`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from torch_elastic_mem.activate import settings
from torch_elastic_mem.errors import BrokerError, TemError

STARTUP = Path(settings.__file__).parent / "startup"
# Seconds without a tenant after which a broker that was started here ends. The program is one while it runs.
IDLE_EXIT = 60


def _limit(name: str, help: str) -> str:
    return f"{help}  [{settings.LIMITS[name]}]"


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--priority", help=f"Class of the account: idle, training (default), ...  [{settings.PRIORITY}]"
)
@click.option("--name", help=f"Name of the account; its class's by default.  [{settings.NAME}]")
@click.option(
    "--device",
    multiple=True,
    metavar="cuda:N",
    help="Device to serve; may be given several times. By default the one that LOCAL_RANK names, else the "
    f"first.  [{settings.DEVICE}]",
)
@click.option("--min", metavar="SIZE", help=_limit("min", "Never reclaimed, and promised."))
@click.option("--low", metavar="SIZE", help=_limit("low", "Reclaimed only when nothing else is left."))
@click.option("--high", metavar="SIZE", help=_limit("high", "Above it, the account trims itself."))
@click.option("--max", metavar="SIZE", help=_limit("max", "Above it, it is out of memory by itself."))
@click.option("--weight", metavar="NUMBER", help=_limit("weight", "Its share of its class."))
@click.option("--no-broker", is_flag=True, help=f"Share with no other process.  [{settings.BROKER}=0]")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(
    ctx: click.Context,
    /,
    priority: str | None,
    name: str | None,
    device: tuple[str, ...],
    no_broker: bool,
    command: tuple[str, ...],
    **limits: str | None,
) -> None:
    """Run a program whose torch draws its CUDA memory from an account.

    The program is not changed: write `tem run -- python train.py`. The Python interpreters that it starts are
    served as well. They share the devices with the other processes of this user through a broker, which is
    started if there is none. An option goes over its variable. With TEM_ENABLE=0 the program runs as if
    without `tem run`.
    """
    environment = dict(os.environ)
    if settings.enabled(environment):
        for said in settings.misspelt(environment):
            click.echo(f"tem run: {said}", err=True)
        given = {settings.PRIORITY: priority, settings.NAME: name, settings.DEVICE: ",".join(device)}
        given |= {settings.LIMITS[limit]: text for limit, text in limits.items()}
        environment |= {variable: value for variable, value in given.items() if value}
        environment |= settings.Settings.read(environment).variables()
        environment["PYTHONPATH"] = with_startup(environment.get("PYTHONPATH", ""))
        environment[settings.BROKER] = "0" if no_broker else _broker(environment)
    sys.stdout.flush()
    # Python ignores these from its start, and the program would inherit that.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        # As shells have it: 127 where there is no such program, 126 where it cannot be run.
        click.echo(f"tem run: {command[0]}: {error.strerror}", err=True)
        ctx.exit(127 if isinstance(error, FileNotFoundError) else 126)


def with_startup(python_path: str) -> str:
    """A PYTHONPATH with the startup folder in front, once."""
    paths = [path for path in python_path.split(os.pathsep) if path != str(STARTUP)] if python_path else []
    return os.pathsep.join([str(STARTUP), *paths])


def _broker(environment: dict[str, str]) -> str:
    """What TEM_BROKER is to be: as it is, else the socket of the broker in the default directory."""
    if (given := environment.get(settings.BROKER)) is not None:
        return given or "0"
    from torch_elastic_mem.broker import paths
    from torch_elastic_mem.broker.launch import ensure

    directory = paths.default_directory(environment).absolute()
    try:
        connection, started = ensure(directory, ["--idle-exit", str(IDLE_EXIT)])
    except (TemError, OSError) as error:
        raise BrokerError(f"{error}; or run the program by itself, by --no-broker") from None
    if started:
        click.echo(f"tem run: started a broker in {directory}; it ends when nobody needs it", err=True)
    # The program keeps the connection open unawares, and so the broker, until it first uses CUDA and after.
    os.set_inheritable(connection.detach(), True)
    return str(paths.Paths(directory).tenants)
