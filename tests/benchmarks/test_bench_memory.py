"""What bench_memory serves and what it says of it; an engine is not needed for that."""

import msgspec
import pytest

from benchmarks.residency import Residency
from benchmarks.traces import Request
from benchmarks.vllm.bench_memory import ASKED, UNASKED, chosen
from benchmarks.vllm.memory_tables import tables
from benchmarks.vllm.memory_worker import Held, Trace

MIB = 1 << 20


def test_a_trace_is_cut_to_its_first_seconds_and_to_what_the_model_takes():
    found = [Request(0.0, 100, 10), Request(2.0, 5000, 30), Request(4.0, 10, 900), Request(9.0, 1, 1)]
    assert chosen(found, 2.0, 4.0, 1000) == [
        Request(0.0, 100, 10),
        Request(1.0, 970, 30),
        Request(2.0, 10, 500),
    ]


def test_equal_traces_bring_equal_requests_and_no_prompt_is_anothers_prefix():
    trace = Trace([Request(0.0, 20, 3), Request(1.5, 20, 4)], 1, 1000, 0.0, True)
    first, second = trace.arrivals()
    assert trace.arrivals() == [first, second]
    assert (second.at, len(second.prompt), second.output) == (1.5, 20, 4)
    assert first.prompt[0:4] != second.prompt[0:4]
    assert msgspec.structs.replace(trace, seed=2).arrivals()[0].prompt != first.prompt


def held(emptied):
    used, kept = Residency(), Residency()
    for now in (0.0, 1.0):
        used.add(now, 10 * MIB, 30 * MIB)
        kept.add(now, 20 * MIB, 30 * MIB)
    return Held(used.figures(), kept.figures(), used.curve(10), 7, 1.0, 0, 40, 30 * MIB, emptied)


@pytest.mark.parametrize(("emptied", "met"), [(8 * MIB, "yes"), (9 * MIB, "NO")])
def test_what_is_mapped_stands_beside_what_is_in_use_and_what_is_kept(emptied, met):
    mapped, idle = tables(
        "A title", {UNASKED: held(emptied), ASKED: held(0)}, 100 * MIB, 8 * MIB, ["It broke."]
    )
    assert [row[0] for row in mapped.rows[:2]] == [UNASKED, ASKED]
    assert mapped.rows[0][1:5] == ["10 MiB / 10 MiB", "10 MiB", "30 MiB / 30 MiB", "3.000"]
    assert mapped.rows[0][6:] == ["1.500", "0", "40"]
    assert all(len(row) == len(mapped.columns) for row in mapped.rows)
    assert mapped.rows[2][4] == "10.000"
    assert "It broke." in mapped.note
    assert [row[-1] for row in idle.rows] == ["", met]


def test_an_engine_that_failed_leaves_its_tables_empty():
    mapped, idle = tables("A title", {}, 100 * MIB, 8 * MIB, ["It broke."])
    assert (mapped.rows, idle.rows, mapped.note) == ([], [], "It broke.")
