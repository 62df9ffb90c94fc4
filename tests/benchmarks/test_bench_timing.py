import gc

import pytest

from benchmarks.timing import interleave, paired_ratio, percentile, summarise, tail_ratio


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


def test_a_ratio_of_tails_says_how_much_hangs_on_few_readings():
    steady = [1.0 + number / 1000 for number in range(1000)]
    sure = tail_ratio([2 * each for each in steady], steady, 99)
    assert (sure.median, sure.n) == (2.0, 1000)
    assert 1.97 < sure.q1 < 2.0 < sure.q3 < 2.03
    # One slow request of a hundred is the whole p99, and is drawn in two of three cases.
    luck = tail_ratio([1.0] * 99 + [9.0], [1.0] * 100, 99)
    assert (luck.median, luck.q1, luck.q3) == (9.0, 1.0, 9.0)
    assert tail_ratio([1.0] * 99 + [9.0], [1.0] * 100, 99) == luck, "the same readings, the same figures"


def test_summaries():
    summary = summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (summary.q1, summary.median, summary.q3) == (2.0, 3.0, 4.0)
    assert summarise([7.0]).median == 7.0
    assert percentile(range(100), 99) == 99
    assert percentile([], 50) == 0.0
