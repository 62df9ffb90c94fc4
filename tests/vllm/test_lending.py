"""Under a broker an engine lends a peer of its class what it does not use, between its blocks too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch_elastic_mem as tem
from tests.broker.service import Service
from tests.vllm.small_engine import BLOCKS, CHUNK, LONG, Engine, MiB
from tests.vllm.test_mover import Runner
from torch_elastic_mem.integrations.vllm.demand import Needs

pytestmark = pytest.mark.timeout(60)
ALL = 100 * MiB


@pytest.fixture
def lent(engines: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Any]]:
    """An engine with less than its share and holes in its chunks, and a peer that has the rest."""
    # The path of a socket is short.
    service = Service(tmp_path_factory.mktemp("l")).start()
    with (
        tem.Arena("host", capacity=ALL, broker=str(service.path)) as other,
        other.account("peer", "serving") as peer,
    ):
        engine = Engine(BLOCKS // 2, arena=tem.Arena("host", capacity=ALL, broker=str(service.path)))
        runner = Runner(engine)
        engine.hold(*range(4, BLOCKS, 4))
        runner.learn()
        memory = peer.range(ALL)
        memory.grow(ALL - BLOCKS * MiB, timeout=LONG)
        yield engine, memory
        memory.close()
        engine.controller.close()
    service.close()


def grown(engine: Engine, memory: Any, chunks: int, timeout: float = LONG) -> bool:
    """Whether a peer that is short got so much more, while the engine takes steps."""
    got: list[bool] = []

    def grow() -> None:
        try:
            memory.grow(chunks * CHUNK, timeout=timeout)
            got.append(True)
        except tem.OutOfMemory:
            got.append(False)

    growing = threading.Thread(target=grow)
    growing.start()
    while growing.is_alive():
        engine.step()
    growing.join()
    return got[0]


def test_blocks_of_an_engine_with_less_than_its_share_move_together_for_a_peer(
    lent: tuple[Engine, Any],
) -> None:
    engine, memory = lent
    assert grown(engine, memory, 12)
    assert engine.cache.resident_bytes == BLOCKS * MiB - 12 * CHUNK
    assert engine.preempted_by == [] and not engine.controller.draining
    engine.assert_sound()


def test_what_its_own_next_step_may_use_is_not_lent(lent: tuple[Engine, Any]) -> None:
    engine, memory = lent
    engine.needs = Needs(2, 2, 4)
    assert not grown(engine, memory, 12, timeout=4.0)
    assert engine.balloon.free_blocks in (4, 5)
    assert engine.preempted_by == []
    engine.assert_sound()
