"""A stream that is captured: the driver allows no event on it, and what is asked of one spoils the graph."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.alloc.home import Home
from tests.alloc.mirror import G
from tests.arena.watch import comes_true
from tests.rungs import FakeRung, Stream

pytestmark = pytest.mark.rungs("fake")
POOL = (1, 0)
GLOBAL = 0  # the mode in which a query elsewhere spoils the capture


@contextmanager
def captured(rung: FakeRung, stream: Stream) -> Iterator[None]:
    """Fails if what happened within has spoiled the capture."""
    pointer, graph = ctypes.c_void_p(stream.handle), ctypes.c_void_p()
    assert rung.driver.cuStreamBeginCapture_v2(pointer, GLOBAL) == 0
    yield
    assert rung.driver.cuStreamEndCapture(pointer, ctypes.byref(graph)) == 0, "the capture is spoiled"


def parked(home: Home) -> int:
    active, allocated = (home.heap.stats()[name]["all"]["current"] for name in ("active", "allocation"))
    return int(active - allocated)


def test_a_capture_that_allocates_grows_and_frees_is_not_spoiled(home: Home, rung: FakeRung) -> None:
    stream, reader = rung.stream(), rung.stream()
    blocks = []
    with captured(rung, stream), home.pool(POOL, stream.handle):
        for nbytes in (100, G, 5 * G):
            held = home.account.held
            blocks.append(home.heap.allocate(nbytes, stream.handle))
            assert home.account.held > held
            rung.write(blocks[-1], b"x")
            home.heap.free(home.heap.allocate(nbytes, stream.handle))
        home.heap.record_stream(blocks[0], reader.handle)
        home.heap.free(blocks.pop(0))
        assert home.account.trim() == 0
        home.arena.snapshot()
        home.arena.collect()
        home.heap.stats()
    home.heap.release_pool(POOL)
    for block in blocks:
        home.heap.free(block)
    assert comes_true(lambda: home.account.held == 0)


def test_a_capture_outside_of_any_pool_is_not_spoiled_either(home: Home, rung: FakeRung) -> None:
    stream, reader = rung.stream(), rung.stream()
    block = home.heap.allocate(G, stream.handle)
    with captured(rung, stream):
        home.heap.record_stream(block, reader.handle)
        home.heap.free(block)
        home.heap.free(home.heap.allocate(3 * G, stream.handle))
        assert home.account.trim() == 0, "no mark can be made before the capture ends"
        home.heap.empty_cache()
    assert home.account.held == 3 * G
    assert home.account.trim() == 3 * G


def test_marks_made_before_a_capture_are_looked_at_within_it_without_harm(home: Home, rung: FakeRung) -> None:
    stream, reader = rung.stream(), rung.stream()
    shared = home.heap.allocate(G, 0)
    home.heap.record_stream(shared, reader.handle)
    reader.submit()
    home.heap.free(shared)
    with captured(rung, stream), home.pool(POOL, stream.handle):
        other = home.heap.allocate(G, 0)
        assert other != shared
        reader.complete()
        again = home.heap.allocate(G, 0)
        assert again == shared
    home.heap.release_pool(POOL)
    for block in (again, other):
        home.heap.free(block)


def test_a_block_recorded_and_freed_within_a_capture_waits_until_after_it(home: Home, rung: FakeRung) -> None:
    stream, side = rung.stream(), rung.stream()
    with captured(rung, stream), home.pool(POOL, stream.handle):
        block = home.heap.allocate(G, stream.handle)
        home.heap.record_stream(block, side.handle)
        home.heap.free(block)
        again = home.heap.allocate(G, stream.handle)
        assert again != block and parked(home) == 1
        assert home.heap.wait_for_streams() is False
    assert parked(home) == 1
    assert home.heap.wait_for_streams() is True
    assert parked(home) == 0
    with home.pool(POOL, stream.handle):
        assert home.heap.allocate(G, stream.handle) == block
    for one in (block, again):
        home.heap.free(one)
    while home.heap.pool_uses(POOL):
        home.heap.release_pool(POOL)


def test_a_capture_on_another_thread_is_not_spoiled_by_what_this_one_does(home: Home, rung: FakeRung) -> None:
    stream, mine = rung.stream(), rung.stream()
    begun, end = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def capture() -> None:
        try:
            with captured(rung, stream):
                begun.set()
                end.wait(10)
        except BaseException as error:  # noqa: BLE001  (told by the main thread)
            failed.append(error)

    thread = threading.Thread(target=capture)
    thread.start()
    begun.wait(10)
    for nbytes in (100, G, 3 * G):
        block = home.heap.allocate(nbytes, mine.handle)
        home.heap.record_stream(block, 0)
        home.heap.free(block)
    home.account.trim()
    home.heap.empty_cache()
    end.set()
    thread.join()
    assert not failed, failed
    assert home.account.held == 0


def test_empty_cache_does_not_wait_for_a_released_pool_while_somebody_captures(
    home: Home, rung: FakeRung
) -> None:
    stream = rung.stream()
    with home.pool(POOL):
        home.heap.free(home.heap.allocate(G, 0))
    with captured(rung, stream):
        home.heap.release_pool(POOL)  # no event can span all streams now
        home.heap.empty_cache()
        assert home.account.held == G
    assert comes_true(lambda: home.account.held == 0)


def test_nobody_waits_for_a_mark_that_no_capture_lets_be_made(home: Home, rung: FakeRung) -> None:
    def pending() -> int:
        (account,) = home.arena._core.state()["accounts"]
        return int(account["pending"])

    mine = rung.stream()
    with home.pool(POOL, rung.stream().handle):
        home.heap.free(home.heap.allocate(G, mine.handle))
        assert pending() == 0
    mine.submit()
    assert pending() == G
    mine.complete()
    home.heap.release_pool(POOL)
