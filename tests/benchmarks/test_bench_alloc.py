import pytest

from benchmarks.alloc_cases import LIVE, pattern
from benchmarks.alloc_loop import Loop, malloc_library
from benchmarks.alloc_tables import by_case, cuda_tables


@pytest.fixture(scope="module")
def loop():
    return Loop(malloc_library())


@pytest.mark.parametrize("threads", [1, 4])
def test_pairs_take_time(loop, threads):
    assert 0 < loop.pairs(512, 1000, threads) < 1e6


def test_a_mixed_load_takes_time(loop):
    assert 0 < loop.mixed([1 << 10, 1 << 20, 512], [0, 1, 0]) < 1e9


def test_the_pattern_repeats_and_is_spread_over_sizes_and_slots():
    sizes, slots = pattern(5000)
    assert (sizes, slots) == pattern(5000)
    assert 512 <= min(sizes) < max(sizes) <= 64 << 20
    assert set(slots) == set(range(LIVE))
    # As many below the geometric middle as above it.
    assert 2300 < sum(size < 185364 for size in sizes) < 2700


def answer(nanoseconds, core=None):
    found = {
        "torch": {"512 B, 1 thread": nanoseconds},
        "mixed": 2 * nanoseconds,
        "python": {"64 B": 10 * nanoseconds},
    }
    return found | ({"core": {"512 B, 1 thread": core}} if core else {})


def test_a_row_stands_for_a_case_and_a_loser_is_shown():
    answers = {
        "native": [answer(100.0), answer(300.0)],
        "expandable": [answer(400.0), answer(400.0)],
        "ours": [answer(200.0, 50.0), answer(600.0, 50.0)],
    }
    rows = cuda_tables(by_case(answers), {})[0].rows
    assert rows[0] == [
        "C++, 512 B, 1 thread",
        "200 ns",
        "400 ns",
        "400 ns",
        "2.00 (2.00 to 2.00)",
        "1.00 (0.75 to 1.25)",
        "50 ns",
    ]
    assert [row[0] for row in rows[1:]] == ["C++, mixed sizes, up to 200 live", "torch.empty, 64 B"]
    assert rows[1][-1] == ""


def test_a_contender_that_failed_leaves_its_column_and_its_reason():
    table = cuda_tables(by_case({"native": [answer(100.0)]}), {"ours": "ours: it broke"})[0]
    assert table.rows[0] == ["C++, 512 B, 1 thread", "100 ns", "failed", "failed", "", "", ""]
    assert "Failed: ours: it broke." in table.note
