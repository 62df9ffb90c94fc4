import pytest

from benchmarks import compiler, floor
from benchmarks.floor import Floor, FloorError

MIB = 1 << 20


@pytest.fixture
def bare():
    with Floor("host", 64 * MIB, 2 * MIB) as opened:
        yield opened


def test_every_step_of_the_floor_takes_time_and_undoes_itself(bare):
    for _ in range(2):
        assert bare.take() > 0
        assert bare.handover() > 0
        assert bare.give() > 0
    bare.hold()
    for _ in range(2):
        assert bare.take_pooled() > 0
        assert bare.handover() > 0
        assert bare.give_pooled() > 0


def test_steps_out_of_order_are_refused(bare):
    with pytest.raises(FloorError, match="give: nothing is mapped"):
        bare.give()
    bare.take()
    with pytest.raises(FloorError, match="take: memory is held already"):
        bare.take()


def test_a_size_that_is_no_multiple_of_the_extent_is_refused():
    with pytest.raises(FloorError, match="multiple"):
        Floor("host", 3 * MIB, 2 * MIB)


def test_a_compiler_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compiler, "BUILD_DIR", tmp_path)
    floor._library.cache_clear()
    with pytest.raises(FloorError, match="no-such-compiler"):
        Floor("host", 2 * MIB, 2 * MIB)
    floor._library.cache_clear()


def test_a_device_that_is_not_there_is_an_error_and_no_crash():
    with pytest.raises(FloorError, match=r"no CUDA driver|cuInit|cuDeviceGet"):
        Floor("cuda:999", 2 * MIB, 2 * MIB)
