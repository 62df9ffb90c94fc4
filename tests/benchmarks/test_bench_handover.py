"""The benchmarks of the broker, small, on memory of this machine."""

import click.testing
import pytest

from benchmarks import bench_handover
from benchmarks.floor import FloorError
from benchmarks.floor.handover import HandoverFloor
from benchmarks.handover_tables import IDLE, NO_GIL, RESERVE, TRAINING
from benchmarks.results import load

MIB = 1 << 20


def test_the_floor_hands_memory_over_and_says_what_cannot_be():
    with HandoverFloor("host", 64 * MIB, 2 * MIB) as floor:
        assert floor.hold() > 0
        assert all(step() > 0 for step in (floor.take, floor.give, floor.create, floor.give))
        with pytest.raises(FloorError, match="no memory is held"):
            floor.give()
        with pytest.raises(FloorError, match="no memory is held"):
            floor.take()
        assert floor.hold() > 0


@pytest.mark.slow
def test_bench_handover(tmp_path):
    out = tmp_path / "handover.json"
    arguments = ["--size", "64MiB", "--rounds", "2", "--json", str(out)]
    done = click.testing.CliRunner().invoke(bench_handover.main, arguments)
    assert done.exit_code == 0, done.output
    result = load(out)
    assert [table.title for table in result.tables][-1] == "Targets"
    assert all(len(row) == len(table.columns) for table in result.tables for row in table.rows)
    for what in (IDLE, NO_GIL, RESERVE, TRAINING):
        assert len(result.raw[what]["take"]) == 2
    # The device was full: what was handed over came by asking.
    assert len(result.raw["asks"]["yield"]) >= 6
    assert result.raw[TRAINING]["steps a second"][0] > 0


def test_bench_handover_refuses_a_size_that_is_no_whole_extents():
    done = click.testing.CliRunner().invoke(bench_handover.main, ["--size", "63MiB"])
    assert done.exit_code == 2
    assert "multiple of 64 MiB" in done.output
