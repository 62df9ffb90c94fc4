"""Which blocks to move where, so that sparse chunks come free: arithmetic over block numbers.

A chunk's memory stays while a request has one block in it. Copied to where nobody has any, the block frees
the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import NamedTuple, Protocol


class Hole(NamedTuple):
    """A block that no request holds.

    Attributes:
        warmth: how late what is cached in it was used; less than 0 where nothing is.
        chunk: the number of its chunk.
        block: its number.
    """

    warmth: int
    chunk: int
    block: int


class Chunk(NamedTuple):
    """A chunk with memory.

    Attributes:
        number: which.
        used: how many of its blocks are in use.
        holes: how many are not.
        cached: how many of these have something cached in them, which goes with the chunk.
    """

    number: int
    used: int
    holes: int
    cached: int


class Blocks(Protocol):
    """What a plan asks of a cache's blocks, of which there may be many thousands."""

    def occupancy(self) -> list[Chunk]:
        """The chunks with memory."""

    def holes(self, without: Collection[int], cached: int) -> list[Hole]:
        """Those that are not on these chunks: all that are empty, and so many of the coldest others."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to move, and what comes free by that.

    Attributes:
        moves: (from, to) block numbers. Each is named once; what is cached at a destination is lost.
        freed: chunks on which no request has a block then.
    """

    moves: list[tuple[int, int]] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)


def plan(blocks: Blocks, held: Callable[[int], Sequence[int] | None], wanted: int, keep: int = 0) -> Plan:
    """Empties up to so many chunks with the fewest moves, and leaves `keep` holes.

    The emptiest chunks that may go are as many as their blocks find holes elsewhere. With chunks of one size
    that is the best there is: each that goes takes its own blocks and holes, one size in all, out of the
    holes that there are. Holes with nothing in them are filled first, those of the fullest chunks before
    others; then the coldest prefixes go.

    Args:
        blocks: the cache's.
        held: the blocks of a chunk that requests hold, and None for one that stays in any case. Asked only
            of the emptiest.
        wanted: chunks.
        keep: holes.
    """
    chunks = blocks.occupancy()
    room = sum(chunk.holes for chunk in chunks) - keep
    sources: list[int] = []
    freed: set[int] = set()
    for chunk in sorted(chunks, key=lambda chunk: (chunk.used, chunk.cached, -chunk.number)):
        if len(freed) == wanted or len(sources) + chunk.used > room - chunk.holes:
            break
        if (found := held(chunk.number)) is None:
            continue
        room -= chunk.holes
        sources += found
        freed.add(chunk.number)
    if not freed:
        return Plan()
    used = {chunk.number: chunk.used for chunk in chunks}
    holes = blocks.holes(freed, len(sources))
    places = nsmallest(len(sources), ((hole.warmth, -used[hole.chunk], hole.block) for hole in holes))
    return Plan([(source, place[-1]) for source, place in zip(sources, places, strict=True)], list(freed))
