"""What a malloc says of itself: figures, segments and events."""

from __future__ import annotations

from typing import Any

import pytest

from tests.alloc.home import Home
from tests.alloc.mirror import SHARED, G, KiB, MiB, Mirror
from tests.rungs import Rung
from torch_elastic_mem import _C


def figure(home: Home, name: str, size: str = "all") -> dict[str, int]:
    one: dict[str, int] = home.heap.stats()[name][size]
    return one


def states(home: Home) -> list[tuple[int, int, str]]:
    """Bytes, bytes as requested and state of every block, by address."""
    return [one[1:] for segment in home.heap.segments() for one in segment["blocks"]]


@pytest.mark.parametrize(
    ("nbytes", "counted"),
    [(0, 512), (1, 512), (512, 512), (513, 1024), (5000, 5120), (MiB - 1, MiB), (MiB + 1, MiB + 512)],
)
def test_a_block_counts_for_its_bytes_rounded_up_to_512(home: Home, nbytes: int, counted: int) -> None:
    block = home.heap.allocate(nbytes, 0)
    size, other = ("small", "large") if counted <= MiB else ("large", "small")
    for name, amount in (
        ("allocation", 1),
        ("active", 1),
        ("allocated_bytes", counted),
        ("active_bytes", counted),
        ("requested_bytes", nbytes),
    ):
        expected = {"current": amount, "peak": amount, "allocated": amount, "freed": 0}
        assert figure(home, name) == figure(home, name, size) == expected, name
        assert set(figure(home, name, other).values()) == {0}, name
    assert figure(home, "reserved_bytes", size)["current"] == home.account.held == G
    assert figure(home, "segment", size)["current"] == 1
    home.heap.free(block)
    for name in ("allocation", "active", "allocated_bytes", "active_bytes", "requested_bytes"):
        after = figure(home, name)
        assert (after["current"], after["freed"]) == (0, after["allocated"]), name


def test_what_another_stream_uses_is_active_until_that_has_passed(home: Home, rung: Rung) -> None:
    reader = rung.stream()
    block = home.heap.allocate(G, 0)
    home.heap.record_stream(block, reader.handle)
    reader.submit()
    home.heap.free(block)
    assert figure(home, "allocation")["current"] == figure(home, "requested_bytes")["current"] == 0
    assert figure(home, "active_bytes")["current"] == G
    assert states(home) == [(G, 0, "parked")]
    reader.complete()
    assert home.heap.wait_for_streams() is True
    assert figure(home, "active_bytes")["current"] == 0
    assert states(home) == [(G, 0, "free")]


def test_peaks_and_sums_begin_again_when_they_are_reset(home: Home) -> None:
    for block in [home.heap.allocate(G, 0) for _ in range(3)]:
        home.heap.free(block)
    keep = home.heap.allocate(G, 0)
    assert figure(home, "allocated_bytes") == {
        "current": G,
        "peak": 3 * G,
        "allocated": 4 * G,
        "freed": 3 * G,
    }
    home.heap.reset_peak()
    assert figure(home, "allocated_bytes")["peak"] == G
    assert figure(home, "reserved_bytes")["peak"] == 3 * G
    assert home.heap.stats()["maps"] > 0
    home.heap.reset_accumulated()
    assert figure(home, "allocated_bytes") == {"current": G, "peak": G, "allocated": 0, "freed": 0}
    assert home.heap.stats()["maps"] == 0
    home.heap.free(keep)
    assert figure(home, "allocated_bytes") == {"current": 0, "peak": G, "allocated": 0, "freed": G}


def test_free_bytes_beside_a_block_on_its_extent_are_inactive_split(home: Home) -> None:
    large, small = home.heap.allocate(G // 2 + 512 * KiB, 0), home.heap.allocate(64 * KiB, 0)
    assert figure(home, "inactive_split_bytes", "large")["current"] == 512 * KiB
    assert figure(home, "inactive_split_bytes", "small")["current"] == G - 64 * KiB
    assert figure(home, "inactive_split")["current"] == 2
    for block in (large, small):
        home.heap.free(block)
    assert figure(home, "inactive_split")["current"] == 0, "whole extents are free"


def test_segments_are_runs_of_one_stream_and_pool_and_say_what_is_in_them(home: Home, rung: Rung) -> None:
    mine = rung.stream().handle
    blocks = [home.heap.allocate(n, 0) for n in (600, G, G)]
    blocks.append(home.heap.allocate(G + 600, mine))
    with home.pool((3, 1)):
        blocks.append(home.heap.allocate(G, 0))
    kinds = [(one["stream"], one["pool"], one["small"], one["bytes"]) for one in home.heap.segments()]
    assert sorted(kinds) == sorted(
        [(0, SHARED, True, G), (0, SHARED, False, 2 * G), (mine, SHARED, False, 2 * G), (0, (3, 1), False, G)]
    )
    (own,) = home.heap.segments((3, 1))
    assert [(one[0], one[3]) for one in own["blocks"]] == [(blocks[4], "live")]
    (of_mine,) = [one for one in home.heap.segments() if one["stream"] == mine]
    assert [one[1:] for one in of_mine["blocks"]] == [
        (G + 1024, G + 600, "live"),
        (64 * KiB - 1024, 0, "free"),
        (G - 64 * KiB, 0, "free"),
    ]
    for block in blocks:
        home.heap.free(block)
    home.heap.release_pool((3, 1))


def test_the_largest_free_block_is_the_streams_own(home: Home, rung: Rung) -> None:
    mine = rung.stream().handle
    assert home.heap.largest_free(0) == 0
    blocks = [home.heap.allocate(n, 0) for n in (3 * G, G, 2 * G)]
    home.heap.free(blocks[0])
    home.heap.free(blocks[2])
    assert (home.heap.largest_free(0), home.heap.largest_free(mine)) == (3 * G, 0)
    home.heap.free(blocks[1])
    assert home.heap.largest_free(0) == 6 * G, "neighbours join"


def test_events_tell_what_happened_in_its_order(home: Home, rung: Rung) -> None:
    reader, recorder = rung.stream(), _C.MallocRecorder(home.heap)
    block = home.heap.allocate(G - 5, 0)
    home.heap.record_stream(block, reader.handle)
    reader.submit()
    home.heap.free(block)
    reader.complete()
    home.account.trim()
    of_block: tuple[Any, ...] = (block, G - 5, 0, SHARED)
    extent = (block, G, 0, SHARED)
    assert recorder.take() == [
        ("map", *extent),
        ("allocate", *of_block),
        ("free", *of_block),
        ("freed", *of_block),
        ("unmap", *extent),
    ]
    del recorder
    home.heap.free(home.heap.allocate(G, 0))


def test_events_replayed_are_the_blocks_and_the_memory_there_is(home: Home, rung: Rung) -> None:
    mine = rung.stream().handle
    mirror = Mirror(_C.MallocRecorder(home.heap))
    blocks = [home.heap.allocate(n * 777, stream) for n in range(0, 1000, 51) for stream in (0, mine)]
    with home.pool((1, 0)):
        inside = [home.heap.allocate(n * 5000, 0) for n in range(0, 300, 17)]
    for block in blocks[::3]:
        home.heap.free(block)
    checkpoint = home.heap.live_in((1, 0))
    for block in inside[::2]:
        home.heap.free(block)
    home.heap.restore((1, 0), checkpoint)
    home.account.trim()
    mirror.catch_up()
    mirror.check(home.heap.stats(), home.heap.segments())
    assert mirror.mapped == home.account.held
    for block in list(mirror.live):
        home.heap.free(block)
    home.heap.release_pool((1, 0))
