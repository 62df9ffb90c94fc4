"""Runs the demo from the first weights to the last proof."""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from pathlib import Path

import msgspec
from rich.console import Console

from torch_elastic_mem.demo.device import choose_backend
from torch_elastic_mem.demo.one_process import OneProcess
from torch_elastic_mem.demo.pair import Pair
from torch_elastic_mem.demo.phase import run_elastic
from torch_elastic_mem.demo.proofs import prove
from torch_elastic_mem.demo.report import Report, make_report, statements
from torch_elastic_mem.demo.timeline import draw_timeline
from torch_elastic_mem.demo.two_processes import TwoProcesses
from torch_elastic_mem.demo.view import LiveView, PlainView, SilentView, View

_SECONDS = 16.0
_OUT = Path("tem-demo")
_INTERRUPTED = 128 + signal.SIGINT


def run_demo(
    seconds: float | None = None,
    capacity: int | None = None,
    backend: str = "auto",
    json_only: bool = False,
    plain: bool = False,
    out: Path | None = None,
    one_process: bool = False,
) -> int:
    """Trains and serves from the same memory, proves that neither could tell, and reports.

    Args:
        seconds: Length of the elastic phase; the proofs take about as long again.
        capacity: Of what is shared, in bytes; by default what suits the backend.
        backend: "auto", "host", "cuda" or "cuda:1".
        json_only: Print the report as JSON on stdout, and nothing else there.
        plain: Print lines instead of a live picture.
        out: Folder for `timeline.png` and `report.json`; made if need be.
        one_process: Run both tenants on threads, in one arena, rather than in two processes under a broker.

    Returns:
        0 if every proof holds and training yielded, 1 if not, 130 after an interrupt.

    Raises:
        TemError: The capacity does not suit the demo, there is no such backend, or a process has died.
    """
    seconds = _SECONDS if seconds is None else seconds
    out = _OUT if out is None else out
    backend = choose_backend(backend)
    # A program reads stdout where JSON is asked for; a person may still watch on stderr.
    console = Console(stderr=json_only, highlight=False, soft_wrap=True)
    try:
        with closing(_view(json_only, plain, seconds, console)) as view:
            view.opening("one process" if one_process else "a broker and two processes")
            with (OneProcess if one_process else TwoProcesses)(backend, capacity, seconds) as pair:
                out.mkdir(parents=True, exist_ok=True)
                report = _play(pair, view, out)
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


def _play(pair: Pair, view: View, out: Path) -> Report:
    """Runs the elastic phase and its proofs, and closes both tenants."""
    view.begin(pair.setting.scale, pair.device)
    outcome = run_elastic(pair, view.elastic)
    verdict = prove(pair, outcome, view.proofs)
    leaked = pair.close()
    timeline = out / "timeline.png"
    draw_timeline(outcome.history, pair.device, timeline)
    return make_report(
        outcome,
        verdict,
        leaked,
        processes=pair.processes,
        backend="host" if pair.setting.backend == "host" else "cuda",
        device=pair.device,
        timeline=str(timeline),
    )


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
