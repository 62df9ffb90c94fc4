"""The benchmark of the broker, small."""

import click.testing
import pytest

from benchmarks import bench_broker
from benchmarks.broker_client import Load, demands, echo
from benchmarks.broker_process import BrokerProcess
from benchmarks.results import load
from benchmarks.worker import WorkerError


def test_demands_are_timed_beside_others_and_leave_nothing():
    with BrokerProcess(bench_broker.OPTIONS) as broker:
        seen = []
        with broker.control() as control:
            # Some hundred milliseconds: the others have to get a turn meanwhile, on a busy machine too.
            figures = demands(
                broker.path, Load(idle=3, busy=2, pause=1000), 10_000, lambda: seen.append(control.state())
            )
            assert len(figures.readings) == 10_000
            assert figures.others > 0
            assert seen[0].clients == 6
            assert seen[0].grants >= 10_001
        assert broker.resident() > 1 << 20
        assert broker.cpu_seconds() > 0


def test_a_demand_that_is_not_granted_is_an_error_in_the_brokers_words():
    with (
        BrokerProcess(["--device", "HOST=1MiB", "--reserve", "HOST=0,0"]) as broker,
        pytest.raises(WorkerError, match="2 MiB"),
    ):
        demands(broker.path, Load(idle=0), 1)


def test_a_broker_that_does_not_start_says_why():
    with pytest.raises(WorkerError, match="not of the form"):
        BrokerProcess(["--device", "HOST"])


def test_the_floor_answers():
    assert len(echo(10).readings) == 10


@pytest.mark.slow
def test_bench_broker(tmp_path):
    out = tmp_path / "broker.json"
    arguments = ["--rounds", "20", "--grants", "100", "--json", str(out)]
    done = click.testing.CliRunner().invoke(bench_broker.main, arguments)
    assert done.exit_code == 0, done.output
    result = load(out)
    assert all(len(row) == len(table.columns) for table in result.tables for row in table.rows)
    assert len(result.raw["tenths"]) == 11
    assert set(result.raw["loads"]) == set(bench_broker.LOADS)
