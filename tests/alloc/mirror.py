"""What a malloc's events say of it: which blocks live, which wait for other streams, what is mapped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch_elastic_mem import _C

KiB, MiB = 1 << 10, 1 << 20
G = 2 * MiB
ALIGNMENT = 512
SMALL = MiB

PoolId = tuple[int, int]
SHARED: PoolId = (0, 0)
ALLOCATED = ("allocation", "allocated_bytes", "requested_bytes")
ACTIVE = ("active", "active_bytes")


def rounded(nbytes: int) -> int:
    """What a block of so many bytes counts for."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


@dataclass
class Figure:
    """As csrc/alloc/malloc.hpp's Stat."""

    current: int = 0
    peak: int = 0
    allocated: int = 0
    freed: int = 0

    def move(self, by: int) -> None:
        self.current += by
        self.peak = max(self.peak, self.current)
        self.allocated += max(by, 0)
        self.freed += max(-by, 0)

    def as_dict(self) -> dict[str, int]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Piece:
    """A block, of as many bytes as requested, or an extent."""

    address: int
    bytes: int
    stream: int
    pool: PoolId

    @property
    def end(self) -> int:
        return self.address + rounded(self.bytes)

    @property
    def size(self) -> str:
        return "small" if rounded(self.bytes) <= SMALL else "large"

    def touches(self, other: Piece) -> bool:
        return self.address < other.end and other.address < self.end


@dataclass
class Mirror:
    """Replays events, and fails at one that cannot be."""

    recorder: _C.MallocRecorder
    live: dict[int, Piece] = field(default_factory=dict)
    parked: dict[int, Piece] = field(default_factory=dict)
    extents: dict[int, Piece] = field(default_factory=dict)
    figures: dict[tuple[str, str], Figure] = field(default_factory=dict)

    def figure(self, name: str, size: str = "all") -> Figure:
        return self.figures.setdefault((name, size), Figure())

    def catch_up(self, watch: Callable[[str, Piece], None] = lambda action, piece: None) -> bool:
        """Replays what happened since the last call; false if nothing did."""
        events = self.recorder.take()
        for action, address, nbytes, stream, pool in events:
            piece = Piece(address, nbytes, stream, pool)
            watch(action, piece)
            getattr(self, action)(piece)
        return bool(events)

    def allocate(self, piece: Piece) -> None:
        for others in (self.live, self.parked):
            assert piece.address not in others
        under = [extent for extent in self.extents.values() if extent.touches(piece)]
        assert {(extent.stream, extent.pool) for extent in under} == {(piece.stream, piece.pool)}
        assert sum(extent.bytes for extent in under) >= rounded(piece.bytes)
        self.live[piece.address] = piece
        self.count(piece, 1, *ALLOCATED, *ACTIVE)

    def free(self, piece: Piece) -> None:
        assert self.live.pop(piece.address) == piece
        self.parked[piece.address] = piece
        self.count(piece, -1, *ALLOCATED)

    def freed(self, piece: Piece) -> None:
        assert self.parked.pop(piece.address) == piece
        self.count(piece, -1, *ACTIVE)

    def map(self, piece: Piece) -> None:
        assert not any(piece.touches(extent) for extent in self.extents.values())
        self.extents[piece.address] = piece
        self.figure("segment").move(1)
        self.figure("reserved_bytes").move(piece.bytes)

    def unmap(self, piece: Piece) -> None:
        assert self.extents.pop(piece.address) == piece
        for block in (*self.live.values(), *self.parked.values()):
            assert not block.touches(piece), "unmapped under a block"
        self.figure("segment").move(-1)
        self.figure("reserved_bytes").move(-piece.bytes)

    def count(self, piece: Piece, sign: int, *names: str) -> None:
        amounts = {"requested_bytes": piece.bytes, "allocation": 1, "active": 1}
        for name in names:
            for size in ("all", piece.size):
                self.figure(name, size).move(sign * amounts.get(name, rounded(piece.bytes)))

    @property
    def mapped(self) -> int:
        return sum(extent.bytes for extent in self.extents.values())

    def on(self, pool: PoolId) -> list[Piece]:
        return [extent for extent in self.extents.values() if extent.pool == pool]

    # What the malloc says of itself.
    def check(self, stats: dict[str, Any], segments: list[dict[str, Any]]) -> None:
        self.check_stats(stats)
        self.check_segments(segments)
        small = {extent for one in segments if one["small"] for extent in self.under(one)}
        for size, extents in (("small", small), ("large", set(self.extents.values()) - small)):
            assert stats["segment"][size]["current"] == len(extents)
            assert stats["reserved_bytes"][size]["current"] == sum(extent.bytes for extent in extents)

    def check_stats(self, stats: dict[str, Any]) -> None:
        for name in (*ALLOCATED, *ACTIVE):
            for size in ("all", "small", "large"):
                assert stats[name][size] == self.figure(name, size).as_dict(), (name, size)
        for name in ("segment", "reserved_bytes"):
            assert stats[name]["all"] == self.figure(name).as_dict(), name
        for name, by_size in stats.items():
            if isinstance(by_size, dict):
                parts = by_size["small"]["current"] + by_size["large"]["current"]
                assert by_size["all"]["current"] == parts, name
                assert all(one["peak"] >= one["current"] >= 0 for one in by_size.values()), name

    def under(self, segment: dict[str, Any]) -> list[Piece]:
        whole = Piece(segment["address"], segment["bytes"], segment["stream"], segment["pool"])
        under = [extent for extent in self.extents.values() if extent.touches(whole)]
        assert sum(extent.bytes for extent in under) == whole.bytes
        assert {(extent.stream, extent.pool) for extent in under} == {(whole.stream, whole.pool)}
        return under

    def check_segments(self, segments: list[dict[str, Any]]) -> None:
        end = 0
        views: dict[str, dict[int, tuple[int, int]]] = {"live": {}, "parked": {}, "free": {}}
        for segment in segments:
            assert segment["address"] >= end, "segments overlap, or are not sorted"
            at, end = segment["address"], segment["address"] + segment["bytes"]
            for address, nbytes, requested, state in segment["blocks"]:
                assert address == at and nbytes > 0, "a gap or an overlap in a segment"
                at += nbytes
                views[state][address] = nbytes, requested
                assert state != "live" or segment["small"] == (nbytes <= SMALL)
            assert at == end
        assert sum(segment["bytes"] for segment in segments) == self.mapped
        assert views["live"] == {a: (rounded(one.bytes), one.bytes) for a, one in self.live.items()}
        assert views["parked"] == {a: (rounded(one.bytes), 0) for a, one in self.parked.items()}
