"""Memory that has been passed on and is nobody's yet."""

from __future__ import annotations

from collections import deque
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from torch_elastic_mem.broker.descriptor import Descriptor
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.protocol import Pass, Passed, ProtocolError
from torch_elastic_mem.broker.session import Session

# With one message; the kernel takes no more.
MOST_DESCRIPTORS = 253
# In a basket. A demand takes no more than come with one message, and few wait at a time. Bytes alone bound
# nothing: an extent may say that it has one, and costs a descriptor of the broker's.
MOST_KEPT = 4 * MOST_DESCRIPTORS


class Extent(NamedTuple):
    """Physical memory, kept alive by its descriptor. `uid` is the user who wrote to it last."""

    bytes: int
    descriptor: Descriptor
    uid: int


class Basket:
    """Extents of one device between the answer that gives their bytes and the grant that takes them.

    The device has no use of them meanwhile. So what is in it is a part of what is free in the ledger: whoever
    charges or settles calls `shrink`.

    Attributes:
        bytes: in it.
    """

    def __init__(self) -> None:
        # With the number of the answer to come.
        self._offered: dict[Session, list[tuple[int, Extent]]] = {}
        self._extents: deque[Extent] = deque()
        self.bytes = 0

    def offer(self, session: Session, request: int, message: Pass) -> None:
        """Keeps what a process passes on until it gives the bytes.

        Raises:
            ProtocolError: it passes on more than one answer may, or extents of no bytes.
        """
        if not message.bytes:
            raise ProtocolError("extents of no bytes passed on")
        offered = self._offered.setdefault(session, [])
        uid = session.process.uid
        offered += [(request, Extent(message.bytes, each, uid)) for each in message.descriptors]
        if len(offered) > MOST_DESCRIPTORS:
            del self._offered[session]
            raise ProtocolError(f"more than {MOST_DESCRIPTORS} extents passed on at once")

    def accept(self, session: Session, request: int, bytes: int) -> None:
        """So much has been given: what was offered with it is in it now. What is more goes to the device."""
        offered = self._offered.pop(session, [])
        if others := [each for each in offered if each[0] != request]:
            self._offered[session] = others
        for number, extent in offered:
            if number == request and extent.bytes <= bytes:
                bytes -= extent.bytes
                self._extents.append(extent)
                self.bytes += extent.bytes
        while len(self._extents) > MOST_KEPT:
            self.bytes -= self._extents.popleft().bytes

    def forget(self, session: Session) -> None:
        """The connection has ended; what it offered goes to the device."""
        self._offered.pop(session, None)

    def take(self, holder: Holder, most: int) -> list[Passed]:
        """Takes out up to `most` bytes for an account. Nobody gets what another user has written."""
        found: list[Extent] = []
        left: deque[Extent] = deque()
        for extent in self._extents:
            fits = extent.bytes <= most and len(found) < MOST_DESCRIPTORS
            if fits and extent.uid == holder.session.process.uid:
                most -= extent.bytes
                self.bytes -= extent.bytes
                found.append(extent)
            else:
                left.append(extent)
        self._extents = left
        found.sort(key=attrgetter("bytes"))
        passed = []
        for size, extents in groupby(found, attrgetter("bytes")):
            descriptors = tuple(extent.descriptor for extent in extents)
            passed.append(Passed(holder.id, len(descriptors), size, descriptors))
        return passed

    def shrink(self, most: int) -> None:
        """Gives back to the device what is more than `most` bytes."""
        while self.bytes > most:
            extent = self._extents.pop()
            self.bytes -= extent.bytes
            extent.descriptor.close()
