"""What bench_multi serves and how it is judged; engines are not needed for that."""

import click.testing
import msgspec
import pytest

from benchmarks.results import load
from benchmarks.vllm import ballast, bench_multi
from benchmarks.vllm.bench_multi import Plan, Settings, merged, serve
from benchmarks.vllm.engine import CONTROL, KVCACHED, OURS, STOCK
from benchmarks.vllm.multi_tables import tables
from benchmarks.vllm.ramps import ENGINES, PATTERNS, Ramp, Run
from benchmarks.vllm.splits import Pace, best, splits, waits
from benchmarks.worker import WorkerError

GIB = 1 << 30
PACE = Pace(0.01, 0.0, 0.0)
SETTINGS = Settings("llama-8b", 24 * GIB, 20.0, 1, 256, 256)


def ramp(peak=100.0, seconds=60.0, delay=0.0, seed=1):
    return Ramp(peak, seconds, delay, 8, 4, seed, 1000)


def test_a_ramp_rises_to_its_peak_and_falls_again():
    times = ramp().times()
    assert times == sorted(times)
    assert times[0] > 0 and times[-1] < 60
    assert len(times) == pytest.approx(3000, rel=0.1)
    thirds = [sum(start <= at < start + 20 for at in times) for start in (0, 20, 40)]
    # The areas under a triangle: 4/9 of half at either side, 5/9 of the whole in the middle.
    assert [count / len(times) for count in thirds] == pytest.approx([2 / 9, 5 / 9, 2 / 9], abs=0.03)


def test_equal_ramps_bring_equal_requests_and_a_delay_only_moves_them():
    now, later = ramp(peak=2.0).arrivals(), ramp(peak=2.0, delay=7.0).arrivals()
    assert ramp(peak=2.0).arrivals() == now
    assert [each.prompt for each in now] == [each.prompt for each in later]
    assert [each.at + 7 for each in now] == pytest.approx([each.at for each in later])
    assert ramp(peak=2.0, seed=2).arrivals()[0].prompt != now[0].prompt


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_engine_has_requests_of_its_own(pattern):
    run = Run(pattern, 8.0, 1)
    ramps = run.ramps(20.0, 256, 256, 1000)
    assert len({each.seed for each in ramps}) == ENGINES
    assert max(each.delay + each.seconds for each in ramps) == run.seconds(20.0)
    other = Run(pattern, 8.0, 2).ramps(20.0, 256, 256, 1000)
    assert not {each.seed for each in ramps} & {each.seed for each in other}


def test_a_request_waits_for_a_slot_and_engines_for_each_other():
    # One slot: the second begins when the first has ended, after its four steps.
    assert waits([[0.0, 0.0]], [1], 4, PACE) == pytest.approx([0.01, 0.05])
    assert waits([[0.0, 0.0]], [2], 4, PACE) == pytest.approx([0.01, 0.01])
    assert waits([[0.0], [0.0]], [1, 1], 4, PACE) == pytest.approx([0.02, 0.02])
    assert waits([[0.0], [9.0]], [1, 1], 4, PACE) == pytest.approx([0.01, 0.01])


def test_the_split_follows_the_load_and_is_even_where_nothing_else_matters():
    assert set(splits(4, 2, 1)) == {(1, 3), (2, 2), (3, 1)}
    burst = [0.0] * 20
    split, score, equal = best([[burst, [0.0], [0.0]]], 24, 50, PACE)
    assert split[0] > split[1] and score < equal
    assert best([[[0.0]] * 3], 24, 50, PACE)[0] == (4, 4, 4)


def test_a_split_gives_away_no_more_than_there_is():
    plan = Plan(SETTINGS, ["staggered"], [8.0], "cuda")
    assert plan.split("equal")[0] == [8 * GIB] * 3
    assert plan.split("2:1:1")[0] == [12 * GIB, 6 * GIB, 6 * GIB]
    searched, said = plan.split("searched")
    assert sum(searched) <= 24 * GIB
    assert said.startswith("searched over a model")


def served(ttft, most=1, cache=10, tokens=("a", "b")):
    seen = {
        "ttft": ttft,
        "tpot": [0.01] * len(ttft),
        "itl": [0.01] * 101,
        "tokens": list(tokens),
        "output_per_second": 100.0,
        "short": 0,
    }
    return {"seen": seen, "preempted": 0, "moved": 0, "most_bytes": most, "cache_bytes": cache}


def test_ours_is_judged_by_the_best_split_and_every_row_stays():
    runs = {
        "staggered, 8/s": {
            "stock 1": [served([0.1, 0.4])],
            "stock 2": [served([0.2, 0.2])],
            "ours": [served([0.2, 0.2], tokens="ax")],
        },
        "overlapping, 24/s": {"stock 1": [served([1.0, 30.0], most=10)], "ours": [served([0.5, 2.0])]},
    }
    shown, targets = tables(runs, 1, 1, "A note.")
    assert [row[0] for row in shown.rows] == [
        "staggered, 8/s, stock 1",
        "staggered, 8/s, stock 2",
        "staggered, 8/s, ours",
        "overlapping, 24/s, stock 1",
        "overlapping, 24/s, ours",
    ]
    assert shown.rows[2][3] == "1.00, 1.00"
    assert shown.rows[2][-1] == "1 of 2"
    assert "A note." in shown.note
    assert [row[1:] for row in targets.rows] == [
        ["1.000", "at most 1.02", "yes"],
        ["1.000 (1.00 to 1.00)", "at most 1.02", "yes"],
        ["0.081", "at most 1.02", "yes"],
        ["0.067 (0.07 to 0.07)", "at most 1.02", "yes"],
        ["15.0", "at least 10", "yes"],
    ]
    assert targets.note.startswith("Best factor where a static split is full: 15.0, overlapping, 24/s")


def test_what_shares_the_memory_too_is_no_static_split():
    runs = {
        "staggered, 8/s": {
            "stock 1": [served([0.2, 0.2], most=10)],
            KVCACHED: [served([0.1, 0.1])],
            "ours": [served([0.2, 0.2])],
        }
    }
    shown, targets = tables(runs, 1, 1, "")
    assert [row[3] for row in shown.rows] == ["1.00, 1.00", "0.50, 0.50", "1.00, 1.00"]
    assert [row[1] for row in targets.rows] == ["1.000", "1.000 (1.00 to 1.00)", "1.0"]


def test_a_second_stock_fleet_is_held_against_the_first():
    runs = {
        "staggered, 8/s": {
            "stock 1": [served([0.2, 0.2], most=10)],
            f"{CONTROL} 1": [served([0.1, 0.1])],
            "ours": [served([0.2, 0.2])],
        }
    }
    shown, targets = tables(runs, 1, 1, "")
    assert [row[3] for row in shown.rows] == ["1.00, 1.00", "0.50, 0.50", "1.00, 1.00"]
    assert [row[1] for row in targets.rows] == ["1.000", "1.000 (1.00 to 1.00)", "1.0"]
    plan = Plan(SETTINGS, ["staggered"], [8.0], "cuda")
    fleets = bench_multi._fleets(plan, [OURS, CONTROL, STOCK], ["equal"])
    assert [each[:2] for each in fleets] == [
        (STOCK, "stock 8:8:8 GiB"),
        (STOCK, "stock, again 8:8:8 GiB"),
        (OURS, OURS),
    ]


def test_the_device_is_filled_but_for_what_is_to_be_shared_and_what_kvcached_leaves_alone():
    # Of 140 GiB, 7 are left alone.
    assert ballast.weight(80 * GIB, 140 * GIB, 12 * GIB, 2 << 20) == 61 * GIB
    assert ballast.weight(80 * GIB + 1, 140 * GIB, 12 * GIB, 2 << 20) == 61 * GIB
    assert ballast.weight(10 * GIB, 140 * GIB, 12 * GIB, 2 << 20) == 0


def part(tmp_path, name, contender, settings=SETTINGS):
    from benchmarks.results import Result, save

    runs = {"staggered, 8/s": {contender: [served([0.1, 0.2])] * ENGINES}}
    machine = {"cpu": "2 x abacus"}
    raw = {"engines": {}, "runs": runs, "notes": [f"{contender}: a note."]}
    path = tmp_path / name
    save(Result("bench_multi", f"run {contender}", machine, msgspec.to_builtins(settings), [], raw), path)
    return path


def test_results_of_several_commands_stand_in_one_table(tmp_path):
    out = tmp_path / "both.json"
    arguments = ["--with", part(tmp_path, "a.json", "stock 1"), "--with", part(tmp_path, "b.json", "ours")]
    settings = ["--shape", "llama-8b", "--kv", "24GiB", "--seconds", "20", "--backend", "cuda"]
    done = click.testing.CliRunner().invoke(
        bench_multi.main, [*map(str, arguments), *settings, "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    result = load(out)
    assert result.command == "run stock 1; run ours"
    assert [row[0] for row in result.tables[0].rows] == ["staggered, 8/s, stock 1", "staggered, 8/s, ours"]
    assert "stock 1: a note. ours: a note." in result.tables[0].note


def test_what_was_run_with_other_settings_is_refused(tmp_path):
    other = msgspec.structs.replace(SETTINGS, seconds=1.0)
    found = load(part(tmp_path, "a.json", "ours", other))
    with pytest.raises(click.UsageError, match="other settings"):
        merged([found], SETTINGS)


class Fleet:
    """Engines of which one ends in the second run."""

    def __enter__(self):
        self.left = 1
        return self

    def __exit__(self, *error):
        pass

    def warm_up(self, load):
        self.warmed = load.count

    def serve(self, ramps, timeout):
        self.left -= 1
        if self.left < 0:
            raise WorkerError("it ended")
        return [len(ramps)]


def test_what_was_served_before_an_engine_failed_is_kept():
    found, failure = serve(Fleet(), Plan(SETTINGS, ["staggered"], [8.0, 9.0], "cuda"), "ours")
    assert (found, failure) == ({"staggered, 8/s": [ENGINES]}, "ours failed: it ended.")


def test_engines_that_do_not_start_are_a_failure_and_not_the_end():
    class Broken(Fleet):
        def __enter__(self):
            raise WorkerError("no memory")

    plan = Plan(SETTINGS, ["staggered"], [8.0], "cuda")
    assert serve(Broken(), plan, "ours") == ({}, "ours failed: no memory.")


@pytest.mark.parametrize(
    "wrong", [["--split", "1:2"], ["--split", "0:1:1"], ["--patterns", "no"], ["--peaks", "x"]]
)
def test_what_cannot_be_served_is_refused(wrong):
    done = click.testing.CliRunner().invoke(bench_multi.main, wrong)
    assert done.exit_code == 2
