"""Nothing is unmapped before its fence, and no fence is a wait for the device."""

from __future__ import annotations

import threading
import time

import pytest

from tests.arena.watch import EXTENT, Completion, MiB, assert_balanced, calls, comes_true, filled
from tests.rungs import FakeRung, Rung
from torch_elastic_mem.errors import InUseError, OutOfMemory

DEVICE_WIDE = ("cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize", "cuMemFree")


def test_memory_stays_until_its_stream_has_got_there(rung: Rung) -> None:
    arena = rung.arena()
    account = arena.account("a")
    memory = filled(account, 8 * MiB)
    rung.write(memory.address + 6 * MiB, b"in use")
    stream = rung.stream()
    stream.submit()
    memory.shrink(4 * MiB, stream=stream.handle)
    time.sleep(0.02)
    assert (account.held, arena.snapshot().limbo) == (8 * MiB, 4 * MiB)
    assert arena.collect() == account.trim() == 0
    assert rung.read(memory.address + 6 * MiB, 6) == b"in use"
    stream.complete()
    assert comes_true(lambda: account.held == 4 * MiB), "the arena takes it back by itself"
    assert arena.snapshot().limbo == 0


def test_a_fence_that_passes_while_somebody_looks_is_not_slept_over(rung: Rung) -> None:
    arena = rung.arena()
    account = arena.account("a")
    memory = filled(account, 8 * MiB, keep=2 * MiB)
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            arena.snapshot()

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(10):
            stream = rung.stream()
            stream.submit()
            memory.shrink(8 * MiB, stream=stream.handle)
            time.sleep(0.003)
            stream.complete()
            assert comes_true(lambda: account.held == 2 * MiB)
            memory.grow(8 * MiB)
    finally:
        done.set()
        looker.join()


def test_work_submitted_after_the_release_does_not_hold_it(rung: Rung) -> None:
    account = rung.arena().account("a")
    memory = filled(account, 4 * MiB)
    stream = rung.stream()
    memory.shrink(2 * MiB, stream=stream.handle)
    stream.submit()
    assert account.held == 2 * MiB
    memory.shrink(2 * MiB, stream=stream.handle)
    assert account.held == 2 * MiB


def test_every_stream_that_used_an_extent_must_have_passed(rung: Rung) -> None:
    account = rung.arena().account("a")
    memory = account.range(4 * MiB)
    memory.grow(4 * MiB)  # one extent
    first, second = rung.stream(), rung.stream()
    for stream in (first, second):
        stream.submit()
        memory.shrink(2 * MiB, stream=stream.handle)
    first.complete()
    time.sleep(0.02)
    assert account.held == 4 * MiB
    second.complete()
    assert comes_true(lambda: account.held == 0)


def test_idle_memory_can_be_held_again_before_its_fence(rung: Rung) -> None:
    account = rung.arena().account("a")
    memory = filled(account, 4 * MiB)
    rung.write(memory.address + 2 * MiB, b"kept")
    stream = rung.stream()
    stream.submit()
    memory.shrink(2 * MiB, stream=stream.handle)
    memory.grow(2 * MiB, stream=stream.handle)
    stream.complete()
    time.sleep(0.02)
    assert account.held == memory.mapped == 4 * MiB
    assert rung.read(memory.address + 2 * MiB, 4) == b"kept"


def test_a_closed_range_waits_for_the_streams_it_was_used_on(rung: Rung) -> None:
    arena = rung.arena()
    account = arena.account("a")
    stream = rung.stream()
    stream.submit()
    memory = filled(account, 4 * MiB, stream=stream.handle)
    stream.submit()
    address = memory.address
    memory.close()
    assert account.held == 4 * MiB
    rung.write(address, b"the device may still write")
    with pytest.raises(InUseError, match="a fence that has not passed; synchronize its stream"):
        account.close()
    stream.complete()
    assert comes_true(lambda: account.held == 0)
    account.close()
    arena.close()


def test_a_range_that_is_dropped_waits_as_a_closed_one_does(rung: Rung) -> None:
    account = rung.arena().account("a")
    stream = rung.stream()
    memory = filled(account, 4 * MiB, stream=stream.handle)
    stream.submit()
    del memory
    time.sleep(0.02)
    assert account.held == 4 * MiB
    stream.complete()
    assert comes_true(lambda: account.held == 0)


def test_a_demand_waits_for_fences_and_gets_the_memory_when_they_pass(rung: Rung) -> None:
    arena = rung.arena(8 * MiB, yield_timeout=10.0)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    old = filled(training, 8 * MiB)
    stream = rung.stream()
    stream.submit()
    old.shrink(6 * MiB, stream=stream.handle)
    completion = Completion(stream, 0.05)
    new = filled(serving, 6 * MiB)
    assert new.mapped == 6 * MiB
    assert completion.begun.is_set()
    assert (training.held, serving.held) == (2 * MiB, 6 * MiB)
    assert_balanced(arena)


def test_a_demand_gives_up_on_a_stream_that_is_stuck(rung: Rung) -> None:
    arena = rung.arena(8 * MiB, yield_timeout=float("inf"))
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    old = filled(training, 8 * MiB)
    stream = rung.stream()
    stream.submit()
    old.shrink(8 * MiB, stream=stream.handle)
    memory = serving.range(8 * MiB)
    with pytest.raises(OutOfMemory):
        memory.grow(4 * MiB, timeout=0.1)
    assert (training.held, serving.held) == (8 * MiB, 0)


def test_a_stuck_stream_does_not_keep_reclaimers_from_being_asked(rung: Rung) -> None:
    arena = rung.arena(8 * MiB, yield_timeout=0.4)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    stuck = filled(training, 4 * MiB)
    cache = filled(training, 4 * MiB)
    training.on_reclaim(lambda nbytes, timeout: cache.shrink(nbytes))
    stream = rung.stream()
    stream.submit()
    stuck.shrink(4 * MiB, stream=stream.handle)
    new = filled(serving, 4 * MiB)
    assert new.mapped == 4 * MiB
    assert (training.held, serving.held) == (4 * MiB, 4 * MiB)


def test_a_dearer_rung_is_asked_for_no_more_than_is_not_on_its_way(rung: Rung) -> None:
    arena = rung.arena(8 * MiB, yield_timeout=10.0)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    cache, work = filled(training, 4 * MiB), filled(training, 4 * MiB)
    stream = rung.stream()
    stream.submit()
    training.on_reclaim(lambda nbytes, timeout: cache.shrink(4 * MiB, stream=stream.handle))
    paused: list[int] = []

    def pause(nbytes: int, timeout: float) -> None:
        paused.append(nbytes)
        work.shrink(nbytes)
        stream.complete()

    training.on_reclaim(pause, rung="pause")
    new = filled(serving, 6 * MiB)
    assert paused == [2 * MiB]
    assert (new.mapped, work.mapped, training.held) == (6 * MiB, 2 * MiB, 2 * MiB)


def test_another_class_is_asked_for_no_more_than_is_not_on_its_way(rung: Rung) -> None:
    arena = rung.arena(8 * MiB, yield_timeout=10.0)
    idle, training = arena.account("idle", "idle"), arena.account("training", "training")
    cache, work = filled(idle, 4 * MiB), filled(training, 4 * MiB)
    stream = rung.stream()
    stream.submit()
    cache.shrink(4 * MiB, stream=stream.handle)
    asked: list[int] = []

    def give(nbytes: int, timeout: float) -> None:
        asked.append(nbytes)
        work.shrink(nbytes)
        stream.complete()

    training.on_reclaim(give)
    new = filled(arena.account("serving", "serving"), 6 * MiB)
    assert asked == [2 * MiB]
    assert (new.mapped, work.mapped) == (6 * MiB, 2 * MiB)


def test_what_was_let_go_of_for_another_demand_is_not_counted_on(rung: Rung) -> None:
    arena = rung.arena(12 * MiB, yield_timeout=20.0)
    training = arena.account("training", "training")
    cache = filled(training, 12 * MiB)
    stream = rung.stream()
    stream.submit()
    asked: list[int] = []
    one_at_a_time = threading.Lock()

    def give(nbytes: int, timeout: float) -> None:
        with one_at_a_time:
            cache.shrink(nbytes, stream=stream.handle)
            asked.append(nbytes)

    training.on_reclaim(give)
    ranges = [arena.account(name, "serving").range(6 * MiB) for name in ("first", "second")]
    demands = [
        threading.Thread(target=each.grow, args=(size * MiB,))
        for each, size in zip(ranges, (4, 6), strict=True)
    ]
    for number, demand in enumerate(demands):
        demand.start()
        assert comes_true(lambda number=number: len(asked) > number)  # type: ignore[misc]
    stream.complete()
    for demand in demands:
        demand.join()
    assert asked == [4 * MiB, 6 * MiB]
    assert [each.mapped for each in (*ranges, cache)] == [4 * MiB, 6 * MiB, 2 * MiB]


def test_what_was_let_go_of_and_is_held_again_is_asked_for_at_the_next_rung(rung: Rung) -> None:
    arena = rung.arena(8 * MiB, yield_timeout=20.0)
    training = arena.account("training", "training")
    cache, work = filled(training, 4 * MiB), filled(training, 4 * MiB)
    stream = rung.stream()
    stream.submit()

    back = threading.Timer(0.05, cache.grow, args=(2 * MiB,), kwargs={"stream": stream.handle})

    def evict(nbytes: int, timeout: float) -> None:
        cache.shrink(2 * MiB, stream=stream.handle)
        back.start()

    asked: list[int] = []

    def pause(nbytes: int, timeout: float) -> None:
        asked.append(nbytes)
        work.shrink(nbytes)

    training.on_reclaim(evict)
    training.on_reclaim(pause, rung="pause")
    new = arena.account("serving", "serving").range(4 * MiB)
    new.grow(2 * MiB)
    back.join()
    stream.complete()
    assert (asked, new.mapped, cache.mapped) == ([2 * MiB], 2 * MiB, 4 * MiB)


def test_an_accounts_own_limit_does_not_wait_for_what_another_has_let_go_of(rung: Rung) -> None:
    arena = rung.arena(16 * MiB, yield_timeout=float("inf"))
    one, other = arena.account("one", "training"), arena.account("other", "training")
    memory, stuck = filled(one, 8 * MiB), filled(other, 8 * MiB)
    stream = rung.stream()
    stream.submit()
    stuck.shrink(4 * MiB, stream=stream.handle)
    one.on_reclaim(lambda nbytes, timeout: memory.shrink(nbytes))
    limited = threading.Thread(target=one.set_limits, kwargs={"max": 4 * MiB})
    limited.start()
    assert comes_true(lambda: not limited.is_alive())
    assert (one.held, other.held) == (4 * MiB, 8 * MiB)
    stream.complete()
    limited.join()


@pytest.mark.rungs("fake")
def test_no_fence_is_a_wait_for_the_device(rung: FakeRung) -> None:
    before = [calls(rung, name) for name in DEVICE_WIDE]
    arena = rung.arena(16 * MiB, reserve=(0, 4 * MiB))
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    stream = rung.stream()
    old = filled(training, 12 * MiB, keep=12 * MiB, stream=stream.handle)
    stream.submit()
    old.shrink(12 * MiB, stream=stream.handle)
    threading.Timer(0.02, stream.complete).start()
    new = filled(serving, 16 * MiB, stream=stream.handle)
    new.close()
    old.close()
    training.close()
    serving.close()
    arena.close()
    assert [calls(rung, name) for name in DEVICE_WIDE] == before


@pytest.mark.rungs("fake")
def test_a_query_that_fails_counts_as_not_passed(rung: FakeRung) -> None:
    arena = rung.arena()
    account = arena.account("a")
    memory = filled(account, 4 * MiB, keep=4 * MiB)
    stream = rung.stream()
    stream.submit()
    memory.shrink(4 * MiB, stream=stream.handle)
    stream.complete()
    rung.fail_nth(1)
    assert arena.snapshot().limbo == EXTENT, "the second extent's query told that the stream has passed"
    assert arena.snapshot().limbo == 0
    assert account.trim() == 4 * MiB


@pytest.mark.rungs("host")
@pytest.mark.rungs("fake")  # the real driver reads through the stale handle, and may crash
def test_a_release_on_a_stream_that_is_gone_changes_nothing(rung: Rung) -> None:
    account = rung.arena().account("a")
    memory = filled(account, 4 * MiB)
    with pytest.raises(Exception, match="stream") as failed:
        memory.shrink(2 * MiB, stream=987654321)
    assert type(failed.value).__module__ == "torch_elastic_mem.errors"
    assert memory.mapped == account.held == 4 * MiB
    memory.shrink(4 * MiB)
    assert account.held == 0


def test_a_lower_demand_waits_for_what_a_higher_class_has_let_go_of(rung: Rung) -> None:
    arena = rung.arena(8 * MiB)
    stream = rung.stream()
    high = filled(arena.account("high", "serving"), 8 * MiB, stream=stream.handle)
    low = arena.account("low", "idle").range(8 * MiB)
    stream.submit()
    high.shrink(8 * MiB, stream=stream.handle)
    timer = threading.Timer(0.05, stream.complete)
    timer.start()
    low.grow(8 * MiB, timeout=30)
    timer.join()
    assert (high.resident, low.mapped) == (0, 8 * MiB)
