"""Whichever driver call fails: the error is clear, everything is as before, and the next try succeeds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pytest

import torch_elastic_mem as tem
from tests.arena.watch import EXTENT, Completion, MiB, assert_balanced, books, comes_true, filled, kept_idle
from tests.rungs import FakeRung, Stream
from torch_elastic_mem import _C
from torch_elastic_mem.elastic_range import ElasticRange
from torch_elastic_mem.errors import DriverError, OutOfMemory, TemError

OUT_OF_MEMORY = 2
UNKNOWN = 999


@dataclass
class Scene:
    """An arena in which both accounts have written to memory, so that all of a growth's steps happen."""

    arena: tem.Arena
    training: tem.Account
    serving: tem.Account
    old: ElasticRange
    new: ElasticRange
    stream: Stream


def scene(rung: FakeRung, *, kept: bool = False, reserve: tuple[int, int] = (0, 0)) -> Scene:
    arena = rung.arena(32 * MiB, reserve=reserve, yield_timeout=0.2)
    training = arena.account("training", "training")
    serving = arena.account("serving", "serving")
    old = kept_idle(training, 16 * MiB) if kept else filled(training, 16 * MiB)
    new = serving.range(64 * MiB)
    new.grow(4 * MiB)
    return Scene(arena, training, serving, old, new, rung.stream())


def with_reclaimer(rung: FakeRung) -> Scene:
    made = scene(rung)

    def evict(nbytes: int, timeout: float) -> None:
        with suppress(DriverError):
            made.old.shrink(nbytes)

    made.training.on_reclaim(evict)
    return made


def warm(rung: FakeRung) -> Scene:
    made = scene(rung, reserve=(0, 8 * MiB))
    made.arena.refill()
    assert made.arena.snapshot().spare == 8 * MiB
    return made


def closed_range(rung: FakeRung) -> Scene:
    made = scene(rung)
    made.stream.submit()
    made.new.grow(EXTENT, stream=made.stream.handle)
    made.new.close()
    made.stream.complete()
    return made


def empty(rung: FakeRung) -> Scene:
    made = scene(rung, reserve=(2 * MiB, 10 * MiB))
    made.arena.refill()
    for memory in (made.old, made.new):
        memory.close()
    made.training.close()
    made.serving.close()
    made.arena.refill()
    return made


# What is atomic either raises and changes nothing, or is done. The others give back what they can.
ATOMIC: dict[str, tuple[Callable[[FakeRung], Scene], Callable[[Scene], object]]] = {
    "reserve": (scene, lambda s: s.serving.range(8 * MiB)),
    "grow from the device": (scene, lambda s: s.new.grow(10 * MiB)),
    "grow from warm extents": (
        warm,
        lambda s: s.new.grow(12 * MiB),
    ),
    "grow by taking idle memory": (lambda rung: scene(rung, kept=True), lambda s: s.new.grow(20 * MiB)),
    "grow by a reclaimer": (with_reclaimer, lambda s: s.new.grow(20 * MiB)),
    "shrink": (scene, lambda s: s.old.shrink(8 * MiB)),
    "shrink behind a fence": (scene, lambda s: s.old.shrink(8 * MiB, stream=s.stream.handle)),
    "close a range": (scene, lambda s: s.old.close()),
    "lower the capacity": (lambda rung: scene(rung, kept=True), lambda s: s.arena.set_capacity(12 * MiB)),
    "lower max": (lambda rung: scene(rung, kept=True), lambda s: s.training.set_limits(max=4 * MiB)),
}
PARTIAL: dict[str, tuple[Callable[[FakeRung], Scene], Callable[[Scene], object]]] = {
    "trim": (lambda rung: scene(rung, kept=True), lambda s: s.training.trim()),
    "collect": (closed_range, lambda s: s.arena.collect()),
    "refill": (lambda rung: scene(rung, reserve=(0, 12 * MiB)), lambda s: s.arena.refill()),
    "close an account": (closed_range, lambda s: s.serving.close()),
    "close the arena": (empty, lambda s: s.arena.close()),
}
# Victims have yielded by the time the demander's own calls fail: the leases stand, what was yielded is free.
YIELDS = {"grow by taking idle memory", "grow by a reclaimer"}


def count_calls(rung: FakeRung, made: Scene, act: Callable[[Scene], object]) -> int:
    rung.fail_nth(0)
    act(made)
    return rung.calls()


def finish(rung: FakeRung, made: Scene, before: tuple[int, int, int]) -> None:
    """Everything can be given back, and nothing is left in the driver."""
    rung.fail_nth(0)
    for memory in (made.old, made.new):
        memory.close()
    for account in (made.training, made.serving):
        account.close()
    if made.arena.snapshot().created:
        assert_balanced(made.arena)
    assert made.arena.snapshot().lost == 0
    made.arena.close()
    assert rung.live()[:2] == before[:2]


@pytest.mark.rungs("fake")
@pytest.mark.parametrize("name", [*ATOMIC, *PARTIAL])
@pytest.mark.parametrize("code", [UNKNOWN, OUT_OF_MEMORY])
def test_every_nth_call_may_fail(rung: FakeRung, name: str, code: int) -> None:
    prepare, act = (ATOMIC | PARTIAL)[name]
    before = rung.live()
    made = prepare(rung)
    total = count_calls(rung, made, act)
    assert total < 200 and (total > 0 or name in PARTIAL), "the arena's thread may be first"
    if name != "close the arena":
        finish(rung, made, before)
    for n in range(1, total + 1):
        made = prepare(rung)
        was = None if name == "close the arena" else books(rung, made.arena)
        rung.fail_nth(n, code)
        try:
            act(made)
        except TemError as error:
            assert isinstance(error, DriverError | OutOfMemory) or name == "close an account", error
            assert len(str(error)) > 20
            rung.fail_nth(0)
            if name in ATOMIC and name not in YIELDS:
                assert books(rung, made.arena) == was, f"call {n} of {total}"
            act(made)
        rung.fail_nth(0)
        if name == "close the arena":
            assert rung.live()[:2] == before[:2]
            continue
        assert_balanced(made.arena)
        finish(rung, made, before)


@pytest.mark.rungs("fake")
def test_a_driver_error_names_the_call_the_device_and_the_code(rung: FakeRung) -> None:
    made = scene(rung)
    rung.fail_nth(1, UNKNOWN)
    # From 4 MiB on, extents that are aligned to their own size: 4, then 8.
    with pytest.raises(DriverError, match=r"cuMemCreate\(4 MiB\) on cuda:0: .*999") as failed:
        made.new.grow(12 * MiB)
    assert failed.value.code == UNKNOWN


@pytest.mark.rungs("fake")
def test_a_device_that_others_have_filled_is_an_out_of_memory_that_says_so(rung: FakeRung) -> None:
    made = scene(rung)
    before = books(rung, made.arena)
    rung.fail_nth(1, OUT_OF_MEMORY)
    with pytest.raises(OutOfMemory, match="memory outside this arena fills it") as refused:
        made.new.grow(8 * MiB)
    assert "training holds 16 MiB" in str(refused.value)
    assert books(rung, made.arena) == before
    assert {a.name: a.denied for a in made.arena.snapshot().accounts} == {"training": 0, "serving": 1}


@pytest.mark.rungs("fake")
def test_an_idle_extent_that_the_driver_keeps_is_counted_and_taken_later(rung: FakeRung) -> None:
    made = scene(rung)
    names = ("cuMemUnmap",)
    rung.fail_nth(0)
    made.old.shrink(4 * MiB)
    assert made.training.held == 12 * MiB
    # The call after the event's record and query is the first unmap.
    for n in range(1, 8):
        faults = made.arena.snapshot().faults
        rung.fail_nth(n, UNKNOWN)
        try:
            made.old.shrink(EXTENT)
        except DriverError:
            continue
        finally:
            rung.fail_nth(0)
        if made.arena.snapshot().faults == faults:
            continue
        assert names[0] in made.arena.snapshot().last_fault
        assert comes_true(lambda: made.training.held == made.old.mapped), "the arena's thread tries again"
        return
    pytest.fail("no unmap was made to fail")


@pytest.mark.rungs("fake")
def test_refilling_a_full_device_does_not_cost_the_warm_extents_there_are(rung: FakeRung) -> None:
    arena = rung.arena(32 * MiB, reserve=(0, 8 * MiB))
    arena.refill()
    account = arena.account("a")
    filled(account, 4 * MiB)
    spare = arena.snapshot().spare
    rung.fail_nth(1, OUT_OF_MEMORY)
    with suppress(OutOfMemory):
        arena.refill()
    rung.fail_nth(0)
    assert arena.snapshot().spare >= spare


@pytest.mark.rungs("fake")
def test_opening_fails_with_the_drivers_words_and_leaves_the_device_free(rung: FakeRung) -> None:
    rung.fail_nth(0)
    rung.arena().close()
    total = rung.calls()
    assert total > 0
    for n in range(1, total + 1):
        rung.fail_nth(n, UNKNOWN)
        try:
            rung.arena().close()
        except DriverError as error:
            assert error.code == UNKNOWN and "999" in str(error)
        rung.fail_nth(0)
        rung.arena().close()


@pytest.mark.rungs("fake")
def test_growing_into_own_idle_memory_makes_no_driver_call_that_could_fail(rung: FakeRung) -> None:
    made = scene(rung, kept=True)
    rung.fail_nth(1)
    made.old.grow(16 * MiB)
    assert rung.calls() == 0
    rung.fail_nth(0)


def two_foreign_stripes(rung: FakeRung, arena: tem.Arena) -> tuple[tem.Account, _C.BlockRange]:
    """A growth whose memory is foreign and lies in two runs of addresses: it needs two memsets."""
    other = arena.account("other")
    memory = filled(other, 16 * MiB)
    for offset in range(0, 16 * MiB, EXTENT):
        rung.write(memory.address + offset, b"foreign")
    memory.close()
    other.close()
    assert arena.snapshot().spare >= 2 * EXTENT
    new = arena.account("new")
    return new, _C.BlockRange(new._core, "two stripes", 1, EXTENT, stripes=2)


@pytest.mark.rungs("fake")
def test_a_memset_that_was_queued_before_another_failed_still_finds_its_memory(rung: FakeRung) -> None:
    arena = rung.arena(16 * MiB, reserve=(0, 8 * MiB))
    account, stripes = two_foreign_stripes(rung, arena)
    rung.fail_nth(0)
    stripes.ensure([0], 0, 0.1)
    total = rung.calls()
    second_failed = False
    for n in range(1, total + 1):
        stripes.close()
        account.close()
        account, stripes = two_foreign_stripes(rung, arena)
        stream = rung.stream()
        stream.submit()
        rung.fail_nth(n, UNKNOWN)
        completion = Completion(stream, 0.03)
        try:
            stripes.ensure([0], stream.handle, 0.5)
        except DriverError as error:
            second_failed = second_failed or ("Memset" in str(error) and completion.begun.is_set())
            assert account.held == 0
        rung.fail_nth(0)
        completion.join()
        stripes.ensure([0], 0, 0.1)
        assert rung.read(stripes.base(0), 64) == rung.read(stripes.base(1), 64) == bytes(64)
    assert second_failed
    assert arena.snapshot().lost == 0
