"""Ranks of one machine's processes are granted memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch_elastic_mem as tem
from tests.arena.watch import comes_true
from tests.broker.service import Service
from tests.vllm.small_ranks import BLOCKS, CHUNK, Engine, MiB, together
from torch_elastic_mem.broker.control import ControlClient

ALL = BLOCKS * MiB
Made = Callable[..., Engine]


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # The path of a socket is short.
    service = Service(tmp_path_factory.mktemp("b")).start()
    yield service
    service.close()


def under(path: Path, made: list[Engine]) -> Engine:
    """Two ranks on one device, each a tenant of the broker, of 100 MiB."""
    arenas = [tem.Arena("host", capacity=100 * MiB, broker=str(path), yield_timeout=0.5) for _ in range(2)]
    made.append(Engine(arenas))
    return made[-1]


def test_under_a_broker_ranks_are_granted_together_or_not_at_all(
    service: Service, made: list[Engine]
) -> None:
    engine = under(service.path, made)
    engine.ranks.ensure(range(4))
    with service.tenant("other") as other:
        number = other.open("other", 1000)
        # Room for one rank's part, and not for both.
        with ControlClient(service.directory / "control.sock") as control:
            grants = control.state().grants + 1
        held = 100 * MiB - 2 * 4 * CHUNK - 6 * CHUNK
        other.get(number, held)
        with pytest.raises(tem.OutOfMemory, match="was refused, so none grows"):
            engine.ranks.ensure(range(4, 8))
        assert engine.chunks() == [[0, 1, 2, 3]] * 2
        with ControlClient(service.directory / "control.sock") as control:
            assert control.state().grants == grants, "no rank had its part at any time"
        assert [each.cache.account.held for each in engine.ones] == [4 * CHUNK] * 2
        other.put(number, held)
    engine.ranks.ensure(range(4, 8))
    assert engine.chunks() == [list(range(8))] * 2


def test_two_engines_that_grow_at_once_never_end_up_with_a_part_each(
    service: Service, made: list[Engine]
) -> None:
    engines = [under(service.path, made) for _ in range(2)]
    # There is room for one engine's 15 chunks on both ranks, and for a part of the other's.
    wanted = range(15)

    def grow(engine: Engine) -> None:
        try:
            engine.ranks.ensure(wanted)
        except tem.OutOfMemory:
            refused.append(engine)

    for _ in range(5):
        refused: list[Engine] = []
        together(*(partial(grow, each) for each in engines))
        assert refused, "there is no room for both"
        for each in engines:
            whole = [] if each in refused else list(wanted)
            settled = [whole] * 2
            assert comes_true(lambda each=each, settled=settled: each.chunks() == settled)
            if whole:
                each.release(*wanted)
                assert comes_true(lambda each=each: each.chunks() == [[], []])
