"""The benchmarks themselves, small, on memory of this machine."""

import pickle

import click.testing
import pytest

from benchmarks import bench_alloc, bench_import, bench_kv, bench_map, bench_replay, bench_train, bench_trim
from benchmarks.results import load
from benchmarks.trim_cases import whole_extent

MIB = 1 << 20


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


def test_bench_alloc(tmp_path):
    out = tmp_path / "alloc.json"
    assert "malloc" in run(bench_alloc.main, "--rounds", 2, "--pairs", 100, "--json", out)
    cases = load(out).raw["cases"]
    assert len(cases) == 6
    assert all(len(readings) == 2 for case in cases.values() for readings in case.values())


def test_bench_trim(tmp_path):
    out = tmp_path / "trim.json"
    shown = run(bench_trim.main, "--rounds", 2, "--back", "8MiB", "--json", out)
    assert "0 of 2" in shown
    turns = load(out).raw["turns"]["ours"]
    assert len(turns) == 2
    for turn in turns:
        assert turn["granted"]["given"] == 8 * MIB
        assert not turn["granted"]["drained"]
        # Sixteen times as much was cached, and the part taken is with the device again.
        assert turn["released"]["created"] == 15 * 8 * MIB


def test_bench_trim_refuses_a_cache_that_is_smaller_than_what_is_taken():
    arguments = ["--back", "8MiB", "--cache", "8MiB"]
    done = click.testing.CliRunner().invoke(bench_trim.main, arguments)
    assert done.exit_code == 1
    assert "too small" in done.output


def test_extents_of_the_floor_are_those_that_were_given():
    assert whole_extent(64 * MIB, 4, 64 * MIB) == 16 * MIB
    assert whole_extent(64 * MIB, 3, 64 * MIB) == 16 * MIB
    assert whole_extent(24 * MIB, 1, 24 * MIB) == 8 * MIB
    assert whole_extent(0, 0, 64 * MIB) == 2 * MIB


def snapshot_of(path):
    def event(action, addr, size, stream=0):
        return {"action": action, "addr": addr, "size": size, "stream": stream}

    history = [event("segment_alloc", 0, 64 * MIB)]
    for number in range(200):
        size = (1 + number * 7919 % 4000) * 1024
        history.append(event("alloc", number, size, 9 if number % 5 == 0 else 0))
        if number >= 8:
            history.append(event("free_completed", number - 8, size))
    segments = [{"device": 0, "address": 0, "total_size": 64 * MIB, "stream": 0, "blocks": []}]
    path.write_bytes(pickle.dumps({"segments": segments, "device_traces": [history]}))


def test_bench_replay(tmp_path):
    recorded, out = tmp_path / "snapshot.pickle", tmp_path / "replay.json"
    snapshot_of(recorded)
    shown = run(bench_replay.main, recorded, "--rounds", 2, "--json", out)
    assert "200 blocks on 2 streams, 192 of them freed again" in shown
    result = load(out)
    assert result.raw["native_peak"] == 64 * MIB
    assert all(turn["reserved"] >= result.raw["peak_allocated"] for turn in result.raw["replays"])
    assert str(tmp_path) not in out.read_text()


def test_bench_replay_wants_one_snapshot():
    done = click.testing.CliRunner().invoke(bench_replay.main, [])
    assert done.exit_code == 2
    assert "--record" in done.output


@pytest.mark.slow
def test_bench_train(tmp_path):
    out = tmp_path / "train.json"
    run(bench_train.main, "--rounds", 1, "--steps", 4, "--json", out)
    answers = load(out).raw["answers"]["gpt-tiny"]
    assert set(answers) == {"native", "ours", "ours, yielding"}
    assert len({turn["losses"] for turns in answers.values() for turn in turns}) == 1


@pytest.mark.slow
def test_bench_import(tmp_path):
    out = tmp_path / "import.json"
    run(bench_import.main, "--rounds", 2, "--out", out)
    assert len(load(out).raw["import"]) == 2
