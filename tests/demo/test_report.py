"""What a person and a program are told."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from torch_elastic_mem.demo.phase import Outcome
from torch_elastic_mem.demo.proofs import Verdict
from torch_elastic_mem.demo.report import Report, make_report, statements
from torch_elastic_mem.demo.sample import History, Sample
from torch_elastic_mem.demo.server import Request
from torch_elastic_mem.demo.side import ServingOutcome, TrainingOutcome
from torch_elastic_mem.demo.timeline import draw_timeline
from torch_elastic_mem.demo.view import LiveView, PlainView
from torch_elastic_mem.snapshot import YieldRecord

MIB = 1 << 20
HOLDS = Verdict(loss_equal=True, tokens_equal=True, uncached_equal=True, uncached_tokens=5)


def history(yields: int = 2) -> History:
    samples = [
        Sample(
            at=n * 0.1,
            training=(90 - n) * MIB,
            training_idle=10 * MIB,
            serving=(20 + n) * MIB,
            serving_idle=2 * MIB,
            free=18 * MIB,
            state="waiting" if 10 < n < 20 else "training",
            steps=n // 5,
            progress=n / 5,
            loss=3.5 if n >= 5 else None,
            tokens=n * 7,
            running=n,
            waiting=1,
            abandoned=1,
            steps_per_second=2.0,
            tokens_per_second=70.0,
        )
        for n in range(40)
    ]
    records = [
        YieldRecord(
            seq=n + 1,
            start_ns=n * 10**9,
            duration_ns=2_500_000,
            demander="serving",
            victim="training",
            rung="pause",
            asked=4 * MIB,
            given=6 * MIB,
        )
        for n in range(yields)
    ]
    return History(128 * MIB, 0, samples, records)


def outcome(yields: int = 2) -> Outcome:
    given = TrainingOutcome([5.5, 4.5], abandoned=1, spilled_bytes=0, let_go=2 * MIB, regained=11 * MIB)
    served = ServingOutcome(
        [Request(0, (1, 2), 3, [4, 5, 6])], preemptions=0, compactions=0, compacted_bytes=0
    )
    return Outcome(given, served, history(yields), seconds=4.0)


def report_of(verdict: Verdict = HOLDS, yields: int = 2, leaked: int = 0) -> Report:
    return make_report(
        outcome(yields), verdict, leaked, processes=2, backend="host", device="cpu", timeline="t.png"
    )


def test_a_report_is_json_with_what_others_read() -> None:
    read = msgspec.json.decode(msgspec.json.encode(report_of()))
    assert read["ok"] is read["loss_equal"] is read["tokens_equal"] is True
    assert (read["yields"], read["given_bytes"], read["returned_bytes"]) == (2, 14 * MIB, 11 * MIB)
    assert (read["leaked_bytes"], read["backend"], read["steps"], read["tokens"]) == (0, "host", 2, 3)
    assert read["processes"] == 2
    assert read["yield_ms"] == [2.5, 2.5]


@pytest.mark.parametrize("broken", ["loss_equal", "tokens_equal", "uncached_equal"])
def test_one_proof_that_fails_is_enough(broken: str) -> None:
    values = {name: getattr(HOLDS, name) for name in ("loss_equal", "tokens_equal", "uncached_equal")}
    report = report_of(Verdict(**values | {broken: False}, uncached_tokens=5))
    assert not report.ok
    assert sum(not holds for holds, _ in statements(report)) == 1


def test_no_yield_and_a_leak_are_not_ok() -> None:
    assert report_of().ok
    assert not report_of(yields=0).ok
    assert not report_of(leaked=1).ok


def test_plain_lines_say_who_holds_what() -> None:
    out = io.StringIO()
    view = PlainView(Console(file=out, soft_wrap=True))
    view.elastic(history(), history().samples[-1])
    view.elastic(history(), history().samples[-1])
    view.close()
    (line,) = out.getvalue().splitlines()
    assert "training 51 MiB (training), serving 59 MiB, free 18 MiB" in line
    assert "2 yields (last 2.5 ms)" in line


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_live_bar_is_as_wide_as_its_frame(width: int) -> None:
    out = io.StringIO()
    view = LiveView(Console(file=out, width=width, force_terminal=True, color_system=None), 4.0)
    view.elastic(history(), history().samples[20])
    view.close()
    bars = [line for line in out.getvalue().splitlines() if "█" in line]
    assert bars
    assert sum(bars[-1].count(glyph) for glyph in "█▓░") == width - 8


def test_the_timeline_is_a_picture(tmp_path: Path) -> None:
    draw_timeline(history(), "cpu", tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    draw_timeline(history(0), "cpu", tmp_path / "quiet.png")
    assert (tmp_path / "quiet.png").stat().st_size > 10_000
