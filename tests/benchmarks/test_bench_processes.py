"""The benchmarks of several processes, in short on the host backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import bench_broker, soak


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


@pytest.mark.slow
def test_the_broker_is_timed_among_its_clients(tmp_path: Path) -> None:
    out = tmp_path / "broker.json"
    done = CliRunner().invoke(bench_broker.main, ["--rounds", "20", "--grants", "200", "--json", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert {len(values) for name, values in result["raw"]["round_trips"].items() if "apart" not in name} == {
        20
    }
    assert len(result["raw"]["memory"]) == 10
