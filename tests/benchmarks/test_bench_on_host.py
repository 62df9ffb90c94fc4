"""The benchmarks themselves, small, on memory of this machine."""

import click.testing
import pytest

from benchmarks import bench_import, bench_kv, bench_map
from benchmarks.results import load


def run(command, *arguments):
    done = click.testing.CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_bench_map(tmp_path):
    out = tmp_path / "map.json"
    shown = run(bench_map.main, "--size", "64MiB", "--rounds", 2, "--out", out)
    assert "Targets" in shown
    result = load(out)
    assert [table.title for table in result.tables][-1] == "Targets"
    assert all(len(row) == len(table.columns) for table in result.tables for row in table.rows)
    assert len(result.raw["warm"]["take"]) == 2
    assert set(result.raw["ensure core"]) == {"1", "2", "4", "8", "16", "32", "64"}


def test_bench_map_refuses_a_size_that_is_no_whole_extents():
    done = click.testing.CliRunner().invoke(bench_map.main, ["--size", "63MiB"])
    assert done.exit_code == 2
    assert "multiple of 64 MiB" in done.output


def test_bench_kv(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        f'{{"timestamp": {40 * number}, "input_length": {600 + number}, "output_length": 20}}'
        for number in range(40)
    ]
    trace.write_text("\n".join(lines))
    out = tmp_path / "kv.json"
    run(bench_kv.main, "--trace", trace, "--capacity", "128MiB", "--out", out)
    result = load(out)
    assert (tmp_path / result.pictures[0]).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in out.read_text()
    runs = result.raw["runs"]
    assert [served["finished"] + served["rejected"] for served in runs] == [40] * 5
    # All caches met the same demands: nothing was short.
    assert len({served["figures"]["mean_live"] for served in runs}) == 1
    assert all(served["figures"]["fragmentation"] >= 1 for served in runs)


@pytest.mark.slow
def test_bench_import(tmp_path):
    out = tmp_path / "import.json"
    run(bench_import.main, "--rounds", 2, "--out", out)
    assert len(load(out).raw["import"]) == 2
