"""Memory that has been passed on and is nobody's yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from torch_elastic_mem.broker.descriptor import Descriptor


class Extent(NamedTuple):
    """Physical memory, kept alive by its descriptor. `uid` is the user who wrote to it last."""

    bytes: int
    descriptor: Descriptor
    uid: int


class Basket:
    """Extents of one device between the answer that gave them and the grant that takes them.

    The device has no use of them meanwhile. So their bytes are free in the ledger, and never more than that:
    whoever grants or discharges calls `shrink`.
    """

    def __init__(self) -> None:
        self._extents: deque[Extent] = deque()
        self.bytes = 0

    def put(self, extents: Iterable[Extent]) -> None:
        """Puts extents in."""
        for extent in extents:
            self._extents.append(extent)
            self.bytes += extent.bytes

    def take(self, uid: int, most: int) -> list[Extent]:
        """Takes out up to `most` bytes that a user may see. Nobody gets what another user has written."""
        found: list[Extent] = []
        left: deque[Extent] = deque()
        for extent in self._extents:
            if extent.uid == uid and extent.bytes <= most:
                most -= extent.bytes
                self.bytes -= extent.bytes
                found.append(extent)
            else:
                left.append(extent)
        self._extents = left
        return found

    def shrink(self, most: int) -> None:
        """Gives back to the device what is more than `most` bytes."""
        while self.bytes > most:
            extent = self._extents.pop()
            self.bytes -= extent.bytes
            extent.descriptor.close()
