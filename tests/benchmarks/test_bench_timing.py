import gc

import pytest

from benchmarks.timing import interleave, paired_ratio, percentile, summarise


def test_cases_take_turns_and_warm_up_is_not_kept():
    order = []

    def case(name):
        def step():
            order.append(name)
            assert not gc.isenabled()
            return float(len(order))

        return step

    readings = interleave({"a": case("a"), "b": case("b")}, 3, label="test", warmup=1)
    assert order == ["a", "b"] * 4
    assert readings == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}
    assert gc.isenabled()


def test_a_ratio_pairs_the_readings_of_a_round():
    # A machine that slows down threefold changes no ratio.
    ratio = paired_ratio([2.0, 6.0, 2.2], [1.0, 3.0, 1.1])
    assert (ratio.median, ratio.n) == (2.0, 3)
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


def test_summaries():
    summary = summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (summary.q1, summary.median, summary.q3) == (2.0, 3.0, 4.0)
    assert summarise([7.0]).median == 7.0
    assert percentile(range(100), 99) == 99
    assert percentile([], 50) == 0.0
