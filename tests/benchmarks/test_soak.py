"""The soak, in short on the host backend."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks import soak


def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    arguments = ["--seconds", "3", "--processes", "4", "--kill-every", "0.7", "--json", str(out)]
    done = CliRunner().invoke(soak.main, arguments)
    assert done.exit_code == 0, done.output
    raw = json.loads(out.read_text())["raw"]
    assert raw["wrong"] == []
    assert raw["lost"] == 0
    assert raw["counts"]["growths"] > 0
    assert raw["counts"]["killed"] + raw["counts"].get("stopped", 0) > 0
