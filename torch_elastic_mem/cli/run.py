"""`tem run`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from torch_elastic_mem.activate import settings

STARTUP = Path(settings.__file__).parent / "startup"


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
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(
    ctx: click.Context,
    priority: str | None,
    name: str | None,
    device: tuple[str, ...],
    command: tuple[str, ...],
) -> None:
    """Run a program whose torch draws its CUDA memory from an account.

    The program is not changed: write `tem run -- python train.py`. The Python interpreters that it starts are
    served as well. With TEM_ENABLE=0 it runs as if without `tem run`.
    """
    environment = dict(os.environ)
    if settings.enabled(environment):
        given = {settings.PRIORITY: priority, settings.NAME: name, settings.DEVICE: ",".join(device)}
        environment |= {variable: value for variable, value in given.items() if value}
        environment |= settings.Settings.read(environment).variables()
        environment["PYTHONPATH"] = with_startup(environment.get("PYTHONPATH", ""))
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
