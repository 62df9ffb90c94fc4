"""The plan of a compaction: against every other choice of chunks, for small caches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from torch_elastic_mem.integrations.vllm.compaction import Chunk, Hole, Plan, plan

SIZE = 4


@dataclass
class Full:
    """A chunk whose blocks are told apart."""

    number: int
    used: list[int]
    holes: list[Hole]
    fixed: bool = False

    def told(self) -> Chunk:
        """As a plan is told of it."""
        cached = sum(hole.warmth >= 0 for hole in self.holes)
        return Chunk(self.number, len(self.used), len(self.holes), cached)


class Cache:
    """Chunks as a plan asks of them."""

    def __init__(self, chunks: Sequence[Full]) -> None:
        self._chunks = chunks

    def occupancy(self) -> list[Chunk]:
        return [chunk.told() for chunk in self._chunks]

    def holes(self, without: Collection[int], cached: int) -> list[Hole]:
        there = [hole for chunk in self._chunks if chunk.number not in without for hole in chunk.holes]
        warm = sorted(hole for hole in there if hole.warmth >= 0)
        return [hole for hole in there if hole.warmth < 0] + warm[:cached]


def planned(chunks: Sequence[Full], wanted: int, keep: int = 0) -> Plan:
    by_number = {chunk.number: chunk for chunk in chunks}

    def held(number: int) -> list[int] | None:
        chunk = by_number[number]
        return None if chunk.fixed else chunk.used

    return plan(Cache(chunks), held, wanted, keep)


@st.composite
def caches(draw: st.DrawFn) -> list[Full]:
    """Chunks of one size with blocks in use, cached and free; some must stay, and the last is short."""
    count = draw(st.integers(1, 7))
    warmth = draw(st.permutations(range(count * SIZE)))
    chunks = []
    for number in range(count):
        blocks = range(number * SIZE, (number + 1) * SIZE)
        if number == count - 1:
            blocks = blocks[: draw(st.integers(1, SIZE))]
        states = [draw(st.sampled_from(("used", "cached", "free"))) for _ in blocks]
        holes = [
            Hole(warmth[block] if state == "cached" else -1, number, block)
            for block, state in zip(blocks, states, strict=True)
            if state != "used"
        ]
        used = [block for block, state in zip(blocks, states, strict=True) if state == "used"]
        chunks.append(Full(number, used, holes, len(blocks) < SIZE or draw(st.booleans())))
    return chunks


def cost(going: Sequence[Full], chunks: Sequence[Full], keep: int) -> int | None:
    """Moves that empty these, if there is room for them and for `keep` blocks more on the others."""
    moves = sum(len(chunk.used) for chunk in going)
    room = sum(len(chunk.holes) for chunk in chunks if chunk not in going)
    return moves if moves + keep <= room else None


@given(chunks=caches(), wanted=st.integers(1, 8), keep=st.integers(0, 2 * SIZE))
def test_no_other_choice_frees_more_or_moves_less(chunks: list[Full], wanted: int, keep: int) -> None:
    found = planned(chunks, wanted, keep)
    costs = {
        count: [
            cost(going, chunks, keep) for going in combinations([c for c in chunks if not c.fixed], count)
        ]
        for count in range(1, wanted + 1)
    }
    possible = [count for count, each in costs.items() if any(moves is not None for moves in each)]
    assert len(found.freed) == max(possible, default=0)
    if found.freed:
        assert len(found.moves) == min(moves for moves in costs[len(found.freed)] if moves is not None)


@given(chunks=caches(), wanted=st.integers(1, 8))
def test_what_is_promised_comes_free_and_nothing_overlaps(chunks: list[Full], wanted: int) -> None:
    found = planned(chunks, wanted)
    used = {block for chunk in chunks for block in chunk.used}
    places = {block: block for block in used} | dict(found.moves)
    assert set(places) == used, "only blocks in use are moved"
    assert len(set(places.values())) == len(used), "two never have one place"
    going = {chunk.number for chunk in chunks if chunk.number in found.freed}
    assert len(going) == len(found.freed)
    assert not {block // SIZE for block in places.values()} & going
    assert not any(chunk.fixed for chunk in chunks if chunk.number in going)
    assert {to for _, to in found.moves} <= {hole.block for chunk in chunks for hole in chunk.holes}
    assert all(source // SIZE in going for source, _ in found.moves), "what may stay is not moved"


@given(chunks=caches(), wanted=st.integers(1, 8))
def test_prefixes_are_lost_where_there_is_no_other_place_and_the_coldest_first(
    chunks: list[Full], wanted: int
) -> None:
    found = planned(chunks, wanted)
    there = [hole for chunk in chunks if chunk.number not in found.freed for hole in chunk.holes]
    taken = sorted(hole for hole in there if hole.block in {to for _, to in found.moves})
    empty = [hole for hole in there if hole.warmth < 0]
    cold = sorted(hole for hole in there if hole.warmth >= 0)
    assert [hole for hole in taken if hole.warmth >= 0] == cold[: max(0, len(taken) - len(empty))]


def chunk_of(number: int, states: str) -> Full:
    """A chunk by a letter a block: in use, cached, or free."""
    blocks = list(enumerate(states, number * SIZE))
    return Full(
        number,
        [block for block, state in blocks if state == "u"],
        [Hole(block if state == "c" else -1, number, block) for block, state in blocks if state != "u"],
    )


def test_the_fullest_chunks_are_filled() -> None:
    chunks = [chunk_of(0, "u..."), chunk_of(1, "uu.."), chunk_of(2, "uuu."), chunk_of(3, "u...")]
    assert planned(chunks, 1).moves == [(12, 11)]
    assert planned(chunks, 2).moves == [(12, 11), (0, 6)]


def test_of_chunks_alike_the_one_goes_with_fewer_prefixes_and_then_the_highest() -> None:
    chunks = [chunk_of(0, "uu.."), chunk_of(1, "u..."), chunk_of(2, "u..."), chunk_of(3, "uc..")]
    assert planned(chunks, 1).freed == [2]


def test_a_cache_without_room_stays_as_it_is() -> None:
    found = planned([chunk_of(number, "uuu.") for number in range(3)], 2)
    assert (found.moves, found.freed) == ([], [])


def test_only_the_emptiest_are_looked_into() -> None:
    chunks = [chunk_of(number, "uu..") for number in range(50)] + [chunk_of(50, "u..."), chunk_of(51, "u...")]
    asked: list[int] = []

    def held(number: int) -> list[int]:
        asked.append(number)
        return chunks[number].used

    assert plan(Cache(chunks), held, 2).freed
    assert asked == [51, 50]
