import pytest

from benchmarks.residency import Residency


@pytest.fixture
def residency():
    """Two seconds at 10 live of 20 mapped, one at 30 of 30, one at nothing of 8."""
    run = Residency()
    run.add(0.0, 10, 20)
    run.add(2.0, 30, 30)
    run.add(3.0, 0, 8)
    run.add(4.0, 0, 0)
    return run


def test_figures_are_weighted_by_time(residency):
    figures = residency.figures()
    assert figures.mean_live == pytest.approx(50 / 4)
    assert figures.mean_mapped == pytest.approx(78 / 4)
    assert (figures.peak_live, figures.peak_mapped, figures.peak_excess) == (30, 30, 10)
    assert figures.fragmentation == pytest.approx(78 / 50)
    assert figures.fragmentation_p95 == 2.0


def test_the_curve_keeps_the_byte_seconds(residency):
    curve = residency.curve(points=3)
    width = 4 / 3
    assert sum(curve.live) * width == pytest.approx(50)
    assert sum(curve.mapped) * width == pytest.approx(78)
    assert curve.seconds == pytest.approx([width / 2, width * 1.5, width * 2.5])
    assert curve.live[0] == pytest.approx(10)
