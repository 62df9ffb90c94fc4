"""Which blocks to move where, so that sparse chunks come free: arithmetic over block numbers.

A chunk's memory stays while a request has one block in it. Copied to where nobody has any, the block frees
the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, order=True)
class Hole:
    """A block that no request holds.

    Attributes:
        warmth: how late what is cached in it was used; less than 0 where nothing is.
        block: its number.
    """

    warmth: int
    block: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk with memory.

    Attributes:
        number: which.
        used: blocks that requests hold.
        holes: those that none does.
        fixed: it stays, whatever is in it.
    """

    number: int
    used: Sequence[int]
    holes: Sequence[Hole]
    fixed: bool = False

    @property
    def cached(self) -> int:
        """Prefixes that go with it."""
        return sum(hole.warmth >= 0 for hole in self.holes)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to move, and what comes free by that.

    Attributes:
        moves: (from, to) block numbers. Each is named once; what is cached at a destination is lost.
        freed: chunks on which no request has a block then.
    """

    moves: list[tuple[int, int]] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)


def plan(chunks: Sequence[Chunk], wanted: int, keep: int = 0) -> Plan:
    """Empties up to so many chunks with the fewest moves, and leaves `keep` holes.

    The emptiest chunks that may go are as many as their blocks find holes elsewhere. With chunks of one size
    that is the best there is: each that goes takes its own blocks and holes, one size in all, out of the
    holes that there are. Holes with nothing in them are filled first, those of the fullest chunks before
    others; then the coldest prefixes go.
    """
    room = sum(len(chunk.holes) for chunk in chunks) - keep
    going: list[Chunk] = []
    homeless = 0
    for chunk in sorted(
        (chunk for chunk in chunks if not chunk.fixed),
        key=lambda chunk: (len(chunk.used), chunk.cached, -chunk.number),
    ):
        room -= len(chunk.holes)
        homeless += len(chunk.used)
        if len(going) == wanted or homeless > room:
            break
        going.append(chunk)
    freed = {chunk.number for chunk in going}
    holes = sorted(
        (hole.warmth, -len(chunk.used), hole.block)
        for chunk in chunks
        if chunk.number not in freed
        for hole in chunk.holes
    )
    sources = [block for chunk in going for block in chunk.used]
    return Plan([(source, hole[-1]) for source, hole in zip(sources, holes, strict=False)], list(freed))
