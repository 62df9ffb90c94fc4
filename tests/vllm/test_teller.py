"""What is in an engine's blocks is told when it has changed, and by nobody who is gone."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import pytest

from torch_elastic_mem.errors import ClosedError
from torch_elastic_mem.integrations.vllm.balloon import Counts
from torch_elastic_mem.integrations.vllm.teller import Teller

pytestmark = pytest.mark.timeout(60)


class Engine:
    """Its counts, one after the other, then the last for ever; and who listens to them."""

    def __init__(self, *counts: Counts, error: Exception | None = None) -> None:
        self.told: queue.Queue[tuple[int, ...]] = queue.Queue()
        self.looks: queue.Queue[Counts] = queue.Queue()
        self._counts = list(counts)
        self._error = error

    def counts(self, between: Callable[[], object]) -> Counts:
        between()
        found = self._counts.pop(0) if len(self._counts) > 1 else self._counts[0]
        self.looks.put(found)
        return found

    def note_blocks(self, in_use: int, cached: int, free: int, parked: int) -> None:
        self.told.put((in_use, cached, free, parked))
        if self._error is not None:
            raise self._error


@pytest.fixture
def tellers() -> Iterator[list[Teller]]:
    made: list[Teller] = []
    yield made
    for each in made:
        each.close()


def test_it_is_told_at_once_and_when_it_has_changed(tellers: list[Teller]) -> None:
    first, second = Counts(1, 2, 3, 4), Counts(2, 2, 2, 4)
    engine = Engine(first, first, second)
    tellers.append(Teller(engine, engine, every=0.001))
    assert [engine.told.get() for _ in range(2)] == [(1, 2, 3, 4), (2, 2, 2, 4)]
    for _ in range(9):
        engine.looks.get()
    assert engine.told.empty()


def test_it_ends_at_once_though_it_looks_seldom() -> None:
    engine = Engine(Counts(0, 0, 0, 0))
    teller = Teller(engine, engine, every=3600.0)
    engine.told.get()
    teller.close()
    assert not teller._thread.is_alive()


def test_an_account_that_is_closed_ends_it_without_a_word(log: pytest.LogCaptureFixture) -> None:
    engine = Engine(Counts(0, 0, 0, 0), error=ClosedError("closed"))
    teller = Teller(engine, engine, every=0.0)
    teller._thread.join()
    assert not log.records


def test_what_nobody_foresaw_is_said_once(log: pytest.LogCaptureFixture) -> None:
    engine = Engine(Counts(0, 0, 0, 0), error=AttributeError("renamed"))
    teller = Teller(engine, engine, every=0.0)
    ident = teller._thread.ident  # that of another test's engine may say so too
    teller._thread.join()
    said = [record.message for record in log.records if record.thread == ident]
    assert said == ["what is in the engine's blocks is not shown any more"]
