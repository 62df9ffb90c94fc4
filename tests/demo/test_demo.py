"""The whole demo, as short as it may be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import torch_elastic_mem as tem
from torch_elastic_mem.demo.main import run_demo


@pytest.mark.parametrize("processes", [1, 2])
def test_four_seconds_prove_it(tmp_path: Path, capfd: pytest.CaptureFixture[str], processes: int) -> None:
    code = run_demo(4.0, None, "host", True, False, tmp_path, processes == 1)
    printed = capfd.readouterr().out
    report = json.loads(printed)
    assert code == 0, printed
    assert report["ok"]
    assert report["loss_equal"]
    assert report["tokens_equal"]
    assert report["uncached_equal"]
    assert report["yields"] > 0
    assert report["given_bytes"] >= report["returned_bytes"] > 0
    assert report["leaked_bytes"] == 0
    assert report["backend"] == "host"
    assert report["processes"] == processes
    assert (tmp_path / "timeline.png").exists()
    assert json.loads((tmp_path / "report.json").read_text()) == report


def processes_with(mark: str) -> list[str]:
    """The command lines of processes with a text in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass
    return found


@pytest.mark.parametrize("one_process", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_interrupt_ends_it_gently(tmp_path: Path, one_process: bool) -> None:
    # A shell's background job ignores interrupts, and its children inherit that.
    program = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from torch_elastic_mem.demo.main import run_demo\n"
        f"out = Path({str(tmp_path)!r})\n"
        f"raise SystemExit(run_demo(60.0, None, 'host', False, True, out, {one_process}))\n"
    )
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "MARK": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "steps/s loss" in line:
                break
        assert len(processes_with(str(tmp_path))) == (1 if one_process else 4)
        time.sleep(0.2)
        demo.send_signal(signal.SIGINT)
        out, err = demo.communicate(timeout=60)
    assert demo.returncode == 130, err
    assert "interrupted" in out
    assert "Traceback" not in err
    assert not (tmp_path / "report.json").exists()
    assert not processes_with(str(tmp_path))


@pytest.mark.parametrize("one_process", [True, False])
def test_what_cannot_be_shown_is_refused_before_anything_runs(tmp_path: Path, one_process: bool) -> None:
    with pytest.raises(tem.InvalidArgument, match="pass a --capacity between"):
        run_demo(4.0, 1 << 20, "host", False, True, tmp_path / "out", one_process)
    assert not (tmp_path / "out").exists()
