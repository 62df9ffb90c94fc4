"""The group of `tem`: its commands by name, and how an error reaches a person."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

import torch_elastic_mem as tem

# Each command is an attribute of that name in a module of that name, beside this one.
COMMANDS = {
    "demo": "Train and serve a small model from the same memory, and prove that nothing was lost.",
    "run": "Run a program whose torch draws its CUDA memory from an account.",
    "serve": "Share the memory of this machine among its processes.",
    "top": "Show who holds which device's memory, live.",
    "ls": "List the accounts of every process.",
    "limit": "Change limits of accounts while they run.",
    "priority": "Move accounts to another class while they run.",
    "reclaim": "Have accounts give memory back.",
    "snapshot": "Print all that the broker says of itself, as JSON.",
    "trace": "Write what moved memory as a trace that ui.perfetto.dev opens.",
    "doctor": "Look for what would keep the system from working, and say how to mend it.",
    "config": "Show the configuration in force, and where each value comes from.",
}


class Commands(click.Group):
    """A group that imports a command when it is run, and not to list it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order that help shows them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"torch_elastic_mem.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command. An error of the package's own is a message and an exit code, not a traceback."""
        try:
            return super().invoke(ctx)
        except tem.TemError as error:
            from torch_elastic_mem.screen.cells import printable

            # A message may have names in it that other processes gave themselves.
            said = "\n".join(map(printable, str(error).splitlines()))
            click.echo(f"tem: {said}", err=True)
            ctx.exit(3 if isinstance(error, tem.BrokerError) else 2)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tem.__version__, prog_name="tem")
def main() -> None:
    """Elastic GPU memory for several tenants of one machine.

    Exit codes: 0 is success; 1, nothing was found or not all was to be had; 2, an error or a mistake in the
    command; 3, no broker to speak with. `run` ends as its program does.
    """
