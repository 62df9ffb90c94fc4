"""`tem doctor`."""

from __future__ import annotations

import os

import click

from torch_elastic_mem.cli.broker import echo_json

_COLOURS = {"ok": "green", "note": "yellow", "wrong": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look for what would keep the system from working, and say how to mend it.

    It looks at the package, torch, the driver and its devices, the broker's directory and the broker. It
    changes nothing and takes no device's memory. The exit code is 1 if something is wrong.
    """
    from torch_elastic_mem.observe.doctor import examine

    findings = []
    for finding in examine(os.environ):
        findings.append(finding)
        if not as_json:
            colour = None if "NO_COLOR" in os.environ else _COLOURS[finding.level]
            click.echo(f"{click.style(f'{finding.level:5}', fg=colour)} {finding.subject}: {finding.says}")
            if finding.mend:
                click.echo(f"      -> {finding.mend}")
    if as_json:
        echo_json(findings)
    ctx.exit(int(any(finding.level == "wrong" for finding in findings)))
