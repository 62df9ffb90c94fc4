"""Runs the demo from the first weights to the last proof."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
from rich.console import Console

import torch_elastic_mem as tem
from torch_elastic_mem.demo.bursts import schedule
from torch_elastic_mem.demo.device import choose_backend, close_stage, equal_bits, open_stage
from torch_elastic_mem.demo.phase import Stage, run_elastic
from torch_elastic_mem.demo.proofs import prove
from torch_elastic_mem.demo.report import Report, make_report, statements
from torch_elastic_mem.demo.timeline import draw_timeline
from torch_elastic_mem.demo.view import LiveView, PlainView, SilentView, View

_SECONDS = 20.0
_OUT = Path("tem-demo")
_INTERRUPTED = 128 + signal.SIGINT


def run_demo(
    seconds: float | None = None,
    capacity: int | None = None,
    backend: str = "auto",
    json_only: bool = False,
    plain: bool = False,
    out: Path | None = None,
) -> int:
    """Trains and serves from one arena, proves that neither could tell, and reports.

    Args:
        seconds: Length of the elastic phase; the proofs take about as long again.
        capacity: Of the arena, in bytes; by default what suits the backend.
        backend: "auto", "host", "cuda" or "cuda:1".
        json_only: Print the report as JSON on stdout, and nothing else there.
        plain: Print lines instead of a live picture.
        out: Folder for `timeline.png` and `report.json`; made if need be.

    Returns:
        0 if every proof holds and training yielded, 1 if not, 130 after an interrupt.

    Raises:
        TemError: The capacity does not suit the demo, or there is no such backend.
    """
    seconds = _SECONDS if seconds is None else seconds
    out = _OUT if out is None else out
    backend = choose_backend(backend)
    # A program reads stdout where JSON is asked for; a person may still watch on stderr.
    console = Console(stderr=json_only, highlight=False, soft_wrap=True)
    try:
        with equal_bits(backend):
            stage = open_stage(backend, capacity)
            out.mkdir(parents=True, exist_ok=True)
            report = _play(stage, seconds, _view(json_only, plain, seconds, console), out)
    except KeyboardInterrupt:
        console.print("interrupted: both tenants have stopped, nothing was proved")
        return _INTERRUPTED
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"
    (out / "report.json").write_text(encoded)
    if json_only:
        sys.stdout.write(encoded)
    else:
        _state(report, out, console)
    return 0 if report.ok else 1


def _play(stage: Stage, seconds: float, view: View, out: Path) -> Report:
    """Runs the elastic phase and its proofs, and closes the stage."""
    device = stage.arena.device
    try:
        view.begin(stage.scale, device)
        arrivals = schedule(stage.scale, seconds, stage.text)
        outcome = run_elastic(stage, arrivals, seconds, view.elastic)
        verdict = prove(stage, outcome, view.proofs)
    except BaseException:
        # The traceback of a failure may hold tensors; it says more than that they are in use.
        with suppress(tem.InUseError):
            close_stage(stage)
        raise
    finally:
        view.close()
    backend = stage.arena.backend
    leaked = close_stage(stage)
    timeline = out / "timeline.png"
    draw_timeline(outcome.history, device, timeline)
    return make_report(outcome, verdict, leaked, backend=backend, device=device, timeline=str(timeline))


def _view(json_only: bool, plain: bool, seconds: float, console: Console) -> View:
    if json_only and not console.is_terminal:
        return SilentView()
    if plain or json_only or not console.is_terminal:
        return PlainView(console)
    return LiveView(console, seconds)


def _state(report: Report, out: Path, console: Console) -> None:
    for holds, statement in statements(report):
        console.print("[green]proved[/]" if holds else "[bold red]FAILED[/]", statement)
    console.print(
        f"{report.steps_per_second:.1f} steps/s and {report.tokens_per_second:.0f} tokens/s "
        f"over {report.seconds:.0f} s; picture and report are in {out}"
    )
