"""`tem demo`."""

from __future__ import annotations

import pathlib

import click

from torch_elastic_mem.cli.sizes import Bytes


@click.command()
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="How long it may take, about.")
@click.option("--capacity", type=Bytes(), help="Memory to share, such as 256MiB.")
@click.option("--backend", type=click.Choice(["auto", "host", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and nothing else on stdout.")
@click.option("--plain", is_flag=True, help="Print lines instead of the live view.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    default="tem-demo",
    show_default=True,
    help="Folder for the picture and the report.",
)
@click.option("--one-process", is_flag=True, help="Run both on threads of one process, without a broker.")
@click.pass_context
def demo(
    ctx: click.Context,
    seconds: float | None,
    capacity: int | None,
    backend: str,
    as_json: bool,
    plain: bool,
    out: pathlib.Path,
    one_process: bool,
) -> None:
    """Train and serve a small model in two processes that share one memory.

    A byte-level transformer is fine-tuned on text of this machine while the same architecture serves bursts
    of requests. Bursts make training yield memory, through a broker that the demo starts for itself; quiet
    gives it back. At the end, both are compared with runs that had all the memory to themselves.
    """
    from torch_elastic_mem.demo.main import run_demo

    ctx.exit(run_demo(seconds, capacity, backend, as_json, plain, out, one_process))
