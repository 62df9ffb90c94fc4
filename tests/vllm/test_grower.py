"""The thread that gets memory for chunks: what was asked comes back by `take`, or was refused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from torch_elastic_mem.errors import DriverError, OutOfMemory
from torch_elastic_mem.integrations.vllm import grower as module
from torch_elastic_mem.integrations.vllm.grower import BATCH, BRIEF, SHORT, WARM, Grower

pytestmark = pytest.mark.timeout(60)

LONG = 3600.0


class FakeMemory:
    """Room for so many chunks; while the gate is shut a call is begun and goes no further."""

    def __init__(self) -> None:
        self.left = 10**6
        self.calls: list[list[int]] = []
        self.asked: list[tuple[str, float | None]] = []
        self.errors: list[Exception | None] = []  # of the calls to come; None for none
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def room(self) -> int:
        return self.left

    def ensure(self, chunks: list[int], rung: str, timeout: float | None) -> None:
        self.calls.append(list(chunks))
        self.asked.append((rung, timeout))
        self.begun.set()
        self.gate.wait()
        if self.errors and (error := self.errors.pop(0)):
            raise error
        if len(chunks) > self.left:
            raise OutOfMemory("no room")
        self.left -= len(chunks)


@pytest.fixture
def memory() -> FakeMemory:
    return FakeMemory()


@pytest.fixture
def grower(memory: FakeMemory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Grower]:
    monkeypatch.setattr(module, "REST", LONG)
    made = Grower(memory)
    yield made
    memory.gate.set()
    made.close()


def settled(grower: Grower) -> list[int]:
    """All that comes of what was asked."""
    taken: list[int] = []
    while grower.coming:
        grower.wait(LONG)
        taken += grower.take()
    return taken


def test_others_are_asked_for_all_they_have_only_by_who_is_short(grower: Grower, memory: FakeMemory) -> None:
    grower.ask([1])
    settled(grower)
    grower.ask([2], short=True)
    settled(grower)
    grower.ask([3])
    settled(grower)
    assert [rung for rung, _ in memory.asked] == [WARM, SHORT, WARM]


def test_what_is_cheap_is_not_waited_for_so_that_who_becomes_short_may_ask_soon(
    grower: Grower, memory: FakeMemory
) -> None:
    memory.left = 1
    grower.ask([1, 2, 3])
    settled(grower)
    grower.ask([2, 3], short=True)
    settled(grower)
    brief = (WARM, BRIEF)
    # What is left once all has been waited for comes at once.
    assert memory.asked == [brief, brief, brief, (SHORT, None), (SHORT, BRIEF)]


def test_a_refusal_of_what_is_cheap_does_not_keep_who_is_short_from_asking(
    grower: Grower, memory: FakeMemory
) -> None:
    memory.left = 0
    grower.ask([1])
    settled(grower)
    assert grower.resting() and not grower.resting(short=True)
    grower.ask([1], short=True)
    settled(grower)
    assert grower.resting() and grower.resting(short=True)


@pytest.mark.parametrize("more", [[], [3]])
def test_who_becomes_short_while_what_is_cheap_is_refused_gets_it_dearly(
    grower: Grower, memory: FakeMemory, more: list[int]
) -> None:
    memory.gate.clear()
    grower.ask([1, 2])
    assert memory.begun.wait(LONG)
    grower.ask(more, short=True)
    memory.errors = [OutOfMemory("nothing is cheap")]
    memory.gate.set()
    assert settled(grower) == [1, 2, *more]
    assert memory.asked == [(WARM, BRIEF), (SHORT, None)]
    grower.ask([4])
    settled(grower)
    assert memory.asked[-1] == (WARM, BRIEF), "and is short no more"


def test_who_gets_what_is_cheap_although_short_is_short_no_more(grower: Grower, memory: FakeMemory) -> None:
    memory.gate.clear()
    grower.ask([1])
    assert memory.begun.wait(LONG)
    grower.ask([], short=True)
    memory.gate.set()
    settled(grower)
    grower.ask([2])
    settled(grower)
    assert memory.asked == [(WARM, BRIEF)] * 2


def test_who_is_refused_what_is_cheap_over_and_over_rests_longer_each_time(
    grower: Grower, memory: FakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(module, "REST", 1.0)
    monkeypatch.setattr(module, "LONGEST_REST", 4.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    memory.left = 0
    for rest in (1.0, 2.0, 4.0, 4.0):
        grower.ask([1])
        settled(grower)
        now += rest - 0.5
        assert grower.resting() and not grower.resting(short=True)
        now += 0.5
        assert not grower.resting()
    grower.ask([1], short=True)
    settled(grower)
    now += 1.0
    assert not grower.resting(short=True) and not grower.resting(), "whoever is short asks at once"


@pytest.mark.parametrize("how", ["cancelled", "refused"])
def test_a_need_that_is_over_is_forgotten(grower: Grower, memory: FakeMemory, how: str) -> None:
    memory.gate.clear()
    grower.ask([1])
    assert memory.begun.wait(LONG)
    grower.ask([2], short=True)
    if how == "cancelled":
        grower.cancel()
    else:
        memory.errors = [None, OutOfMemory("no room")]
    memory.gate.set()
    settled(grower)
    grower.ask([3])
    settled(grower)
    assert memory.asked[-1] == (WARM, BRIEF)


def test_what_was_asked_comes_back_once(grower: Grower, memory: FakeMemory) -> None:
    grower.ask([3, 4])
    grower.wait(LONG)
    assert grower.take() == [3, 4]
    assert (grower.take(), grower.coming, memory.calls) == ([], [], [[3, 4]])
    assert not grower.resting() and grower.refusals == 0


def test_what_was_asked_is_coming_until_it_is_taken(grower: Grower, memory: FakeMemory) -> None:
    memory.gate.clear()
    grower.ask([1, 2])
    assert memory.begun.wait(LONG)
    grower.ask([5])
    assert sorted(grower.coming) == [1, 2, 5]
    assert grower.take() == []
    memory.gate.set()
    grower.wait(LONG)
    assert sorted(grower.coming) == [1, 2, 5]
    assert settled(grower) == [1, 2, 5]


def test_much_is_mapped_in_batches_in_order(grower: Grower, memory: FakeMemory) -> None:
    wanted = list(range(2 * BATCH + 3))
    grower.ask(wanted)
    assert settled(grower) == wanted
    assert [len(call) for call in memory.calls] == [BATCH, BATCH, 3]


def test_of_a_refused_batch_comes_what_there_is_room_for_one_by_one(
    grower: Grower, memory: FakeMemory
) -> None:
    memory.left = 2
    grower.ask([6, 7, 8, 9])
    assert settled(grower) == [6, 7]
    assert memory.calls == [[6, 7, 8, 9], [6], [7], [8]], "it stops at the first that is refused"
    assert grower.resting() and grower.refusals == 1


def test_a_single_chunk_that_is_refused_is_not_tried_again(grower: Grower, memory: FakeMemory) -> None:
    memory.left = 0
    grower.ask([6])
    assert settled(grower) == []
    assert memory.calls == [[6]]


def test_after_a_refusal_what_else_was_asked_is_forgotten(grower: Grower, memory: FakeMemory) -> None:
    memory.left = BATCH - 1
    grower.ask(list(range(3 * BATCH)))
    assert settled(grower) == list(range(BATCH - 1))
    assert all(max(call) < BATCH for call in memory.calls)


def test_it_does_not_rest_for_ever(
    grower: Grower, memory: FakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.left = 0
    grower.ask([1])
    settled(grower)
    assert grower.resting()
    monkeypatch.setattr(module, "REST", 0.0)
    assert not grower.resting()
    memory.left = 1
    grower.ask([1])
    assert settled(grower) == [1]


def test_the_first_refusal_in_need_is_logged_and_the_others_are_counted(
    grower: Grower, memory: FakeMemory, log: pytest.LogCaptureFixture
) -> None:
    memory.left = 0
    grower.ask([1])
    settled(grower)
    assert log.records == []
    for _ in range(2):
        grower.ask([1], short=True)
        settled(grower)
    assert grower.refusals == 3
    assert [record.levelno for record in log.records] == [logging.WARNING]
    assert "no room" in log.text


@pytest.mark.parametrize(
    "error", [DriverError("the driver's refusal", 2), RuntimeError("the driver's refusal, by torch")]
)
def test_another_error_is_logged_and_the_thread_survives_it(
    grower: Grower, memory: FakeMemory, log: pytest.LogCaptureFixture, error: Exception
) -> None:
    memory.errors = [error]
    grower.ask([1, 2])
    assert settled(grower) == []
    assert memory.calls == [[1, 2]], "what the driver refuses is not tried one by one"
    assert [record.levelno for record in log.records] == [logging.ERROR]
    assert "the driver's refusal" in log.text
    assert grower.resting()
    grower.ask([1, 2])
    assert settled(grower) == [1, 2]


def test_another_error_while_chunks_are_tried_one_by_one_keeps_those_before_it(
    grower: Grower, memory: FakeMemory
) -> None:
    memory.errors = [OutOfMemory("no room"), None, DriverError("the driver's refusal", 2)]
    grower.ask([1, 2, 3])
    assert settled(grower) == [1]
    assert memory.calls == [[1, 2, 3], [1], [2]]


def test_cancelling_drops_what_was_not_begun(grower: Grower, memory: FakeMemory) -> None:
    memory.gate.clear()
    grower.ask([1])
    assert memory.begun.wait(LONG)
    grower.ask([2, 3])
    grower.cancel()
    assert grower.coming == [1]
    memory.gate.set()
    assert settled(grower) == [1]
    assert memory.calls == [[1]]


def test_waiting_ends_at_once_where_nothing_is_asked_for_or_something_is_ready(grower: Grower) -> None:
    grower.wait(LONG)
    grower.ask([1])
    grower.wait(LONG)
    grower.wait(LONG)
    assert grower.take() == [1]
    grower.wait(LONG)


def test_waiting_ends_when_memory_is_refused(grower: Grower, memory: FakeMemory) -> None:
    memory.left = 0
    memory.gate.clear()
    grower.ask([1])
    assert memory.begun.wait(LONG)
    waiting = threading.Thread(target=grower.wait, args=(LONG,))
    waiting.start()
    memory.gate.set()
    waiting.join()
    assert (grower.take(), grower.coming) == ([], [])


def test_waiting_lasts_no_longer_than_it_may(grower: Grower, memory: FakeMemory) -> None:
    memory.gate.clear()
    grower.ask([1])
    grower.wait(0.0)
    assert (grower.take(), grower.coming) == ([], [1])


def test_closing_ends_the_thread_after_what_it_is_doing(grower: Grower, memory: FakeMemory) -> None:
    before = threading.active_count()
    memory.gate.clear()
    grower.ask([1])
    assert memory.begun.wait(LONG)
    grower.ask([2])
    closing = threading.Thread(target=grower.close)
    closing.start()
    memory.gate.set()
    closing.join()
    assert threading.active_count() == before - 1
    assert memory.calls == [[1]]
    assert grower.take() == [1]


def test_closing_twice_is_harmless(grower: Grower) -> None:
    grower.close()
    grower.close()


def test_who_was_refused_rests_until_memory_is_seen_to_have_come_free(
    grower: Grower, memory: FakeMemory
) -> None:
    memory.left = 1
    memory.errors = [OutOfMemory("no room")] * 2
    grower.ask([1, 2], short=True)
    settled(grower)
    assert grower.resting(short=True) and grower.refused(short=True)
    memory.left = 2
    assert not grower.resting(short=True) and not grower.refused(short=True)
    memory.left = 1
    assert grower.resting(short=True)
