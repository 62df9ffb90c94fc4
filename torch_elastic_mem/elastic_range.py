"""A raw elastic range: addresses that memory is put under from the bottom up."""

from __future__ import annotations

from collections.abc import Callable

from torch_elastic_mem import _C
from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.units import format_bytes, parse_bytes


class ElasticRange:
    """Addresses with memory under their first `mapped` bytes. Made by `Account.range`.

    Thread-safe, except that two threads that grow or shrink at once disagree about the end.
    """

    def __init__(
        self,
        account: _C.Account,
        name: str,
        nbytes: int,
        keep: int,
        extent: int,
        granularity: int,
        seconds: Callable[[float | None], float],
    ) -> None:
        if nbytes == 0:
            raise InvalidArgument("a range of zero bytes has no addresses; ask for at least one byte")
        self._granularity = granularity
        self._seconds = seconds
        self._units = -(-nbytes // granularity)
        self._held = 0
        self._name = f"a range of {format_bytes(nbytes)} of {name}"
        self._core = _C.BlockRange(
            account, self._name, self._units, granularity, keep=keep, extent_bytes=extent
        )

    @property
    def address(self) -> int:
        """Where it starts."""
        return self._core.base(0)

    @property
    def mapped(self) -> int:
        """Bytes from the start that memory is held under."""
        return self._held * self._granularity

    @property
    def resident(self) -> int:
        """Bytes of memory under it, idle ones included."""
        return self._core.resident_bytes

    def _count(self, nbytes: int | str) -> int:
        count = -(-parse_bytes(nbytes) // self._granularity)
        if count == 0:
            raise InvalidArgument("growing or shrinking by zero bytes changes nothing")
        return count

    def grow(self, nbytes: int | str, *, stream: int = 0, timeout: float | None = None) -> None:
        """Puts memory under the next `nbytes`, rounded up to the granularity. All or nothing.

        Args:
            nbytes: how many bytes more.
            stream: the CUDA stream on which memory that another tenant wrote to is zeroed.
            timeout: seconds to wait for others to yield; None: the arena's `yield_timeout`.

        Raises:
            OutOfMemory: the memory is not to be had. InvalidArgument: beyond the range's addresses.
        """
        count, seconds = self._count(nbytes), self._seconds(timeout)
        if count > self._units - self._held:
            raise InvalidArgument(
                f"{self._name} cannot grow by {format_bytes(count * self._granularity)}: "
                f"{format_bytes((self._units - self._held) * self._granularity)} of its addresses are left"
            )
        self._core.ensure(range(self._held, self._held + count), stream, seconds)
        self._held += count

    def shrink(self, nbytes: int | str, *, stream: int = 0) -> None:
        """Lets the last `nbytes`, rounded up, go behind what `stream` has been given so far.

        Raises:
            InvalidArgument: more than is mapped.
        """
        count = self._count(nbytes)
        if count > self._held:
            raise InvalidArgument(
                f"{self._name} cannot shrink by {format_bytes(count * self._granularity)}: "
                f"{format_bytes(self.mapped)} is mapped"
            )
        self._core.release(range(self._held - count, self._held), stream)
        self._held -= count

    def close(self) -> None:
        """Gives everything back. Harmless the second time."""
        self._core.close()
        self._held = 0
