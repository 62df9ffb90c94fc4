"""What an engine's memory is to its controller: the cache of one process, or those of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch_elastic_mem.errors import OutOfMemory


class CalledOff(OutOfMemory):
    """A growth came to nothing for somebody else's sake; the next one need not."""


class Resting(Protocol):
    """Who knows which chunks have memory, and can give up all of them between two steps.

    Attributes:
        weights_away: the model sleeps.
    """

    weights_away: bool

    @property
    def away(self) -> bool:
        """Whether it has."""

    @property
    def bytes(self) -> int:
        """What bringing it back takes."""

    def put_away(self) -> None:
        """Gives all memory back; what it held is lost."""

    def bring_back(self, timeout: float) -> None:
        """Puts memory under what must never lack it."""


class Removable(Protocol):
    """A callback that was registered."""

    def remove(self) -> None:
        """It is not called any more."""


class Charged(Protocol):
    """What of an account is used here."""

    def on_reclaim(self, fn: Callable[[int, float], object], rung: str) -> Removable:
        """Registers who is asked for memory."""

    def note_blocks(self, in_use: int, cached: int, free: int, parked: int) -> None:
        """Says what is in the blocks."""


class EngineMemory(Protocol):
    """Memory under an engine's blocks, in chunks of neighbours.

    Attributes:
        num_blocks: of the whole cache.
        chunk_blocks: blocks that come and go together.
        chunk_bytes: what a whole chunk takes.
        freed_bytes: what giving up a chunk frees at least, in what demands are counted in.
        on_enqueued: called when a step needs to be waited for no longer before chunks are released.
        resting: whom sleep and wake-up go to.
    """

    num_blocks: int
    chunk_blocks: int
    chunk_bytes: int
    freed_bytes: int
    on_enqueued: Callable[[], None]
    resting: Resting | None

    @property
    def account(self) -> Charged:
        """Whose demands are answered."""

    def freed(self, chunks: Iterable[int]) -> int:
        """What giving up these chunks frees; while they have memory."""

    def use_stream(self) -> None:
        """The calling thread's stream is the one whose work touches the cache."""

    def ensure(self, chunks: Iterable[int], rung: str = "pause", timeout: float | None = None) -> None:
        """Puts memory under all of the chunks or none, or raises OutOfMemory."""

    def room(self) -> int:
        """Bytes that are to be had without asking anybody, as far as this process knows."""

    def release(self, chunks: Iterable[int]) -> None:
        """Lets it go, after all that steps so far may do to it."""

    def going(self) -> Iterable[int]:
        """Chunks that were let go and have memory yet, as far as is known: others can be had sooner."""

    def number(self, step: Any) -> None:
        """A step has been scheduled; the engine's thread calls it."""
