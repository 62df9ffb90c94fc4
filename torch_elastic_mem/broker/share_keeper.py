"""The descriptors of what is shared: taken from publishers, kept for members, closed when the last has left.

A descriptor of an allocation keeps its memory, whoever made it. So what is shared outlives its publisher, and
is freed when the last member has gone and the descriptors here are closed.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch_elastic_mem.broker.books import Books
from torch_elastic_mem.broker.broker import Broker
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.session import Process
from torch_elastic_mem.broker.share_messages import Attach, Publish
from torch_elastic_mem.broker.shares import Member, Share
from torch_elastic_mem.errors import BrokerError, InvalidArgument


@dataclass(slots=True, eq=False)
class Kept:
    """The descriptors of a share. Closed by `close`."""

    header: int
    extents: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Gives the memory up, as far as it is the broker's."""
        close_all([self.header, *self.extents])


@dataclass(slots=True, eq=False)
class Publishing:
    """A share whose extents are still coming."""

    books: Books
    publisher: Holder
    wanted: Publish
    kept: Kept


@dataclass(frozen=True, slots=True, eq=False)
class Membership:
    """A process's part in a share."""

    books: Books
    share: Share
    member: Member


class ShareKeeper:
    """Keeps what is shared of all devices. For the event loop's thread alone."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._kept: dict[Share, Kept] = {}
        self._promised = 0  # extents of all that is shared, or about to be

    @property
    def room(self) -> int:
        """Descriptors that are left for what is shared. Half of all are for tenants."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return max(0, soft // 2 - self._promised)

    def begin(self, process: Process, wanted: Publish, fds: list[int]) -> Publishing:
        """Begins to take a share in; its header is taken out of `fds`.

        Raises:
            TemError: it cannot be shared.
        """
        books, publisher = self._account(process, wanted)
        books.shares.check(wanted.name, process.uid, wanted.bytes, publisher)
        if wanted.extents > self.room:
            raise BrokerError(
                f"'{wanted.name}' has {wanted.extents} extents, a descriptor each, and the broker has "
                f"{self.room} left for what is shared; have its limit raised (ulimit -n)"
            )
        self._promised += wanted.extents
        return Publishing(books, publisher, wanted, Kept(fds.pop()))

    def take(self, coming: Publishing, process: Process, fds: list[int]) -> Membership | None:
        """Takes extents out of `fds`. With the last of them the share begins.

        Raises:
            TemError: there are more than were promised, or somebody else was faster.
        """
        extents, wanted = coming.kept.extents, coming.wanted
        if len(fds) > wanted.extents - len(extents):
            raise InvalidArgument(f"more extents came than '{wanted.name}' has, {wanted.extents}")
        extents += fds
        fds.clear()
        if len(extents) < wanted.extents:
            return None
        member = Member(process, wanted.process)
        share = coming.books.shares.publish(wanted.name, wanted.bytes, coming.publisher, member)
        self._kept[share] = coming.kept
        return Membership(coming.books, share, member)

    def give_up(self, coming: Publishing) -> None:
        """The rest of a share will not come."""
        self._promised -= coming.wanted.extents
        coming.kept.close()

    def attach(self, process: Process, wanted: Attach) -> Membership:
        """Makes a process a member.

        Raises:
            TemError: nobody shares that there, or not with this user.
        """
        books = self._broker.books.get(wanted.device)
        where = [
            device
            for device, each in self._broker.books.items()
            if any(share.name == wanted.name for share in each.shares)
        ]
        if where and wanted.device not in where:
            raise InvalidArgument(
                f"'{wanted.name}' is on device {', '.join(where)}, and was asked for on {wanted.device}; "
                f"attach on the device that it is on"
            )
        if books is None:
            raise InvalidArgument(f"nobody shares '{wanted.name}', or has any memory, on {wanted.device}")
        member = Member(process, wanted.process)
        return Membership(books, books.shares.join(wanted.name, member), member)

    def kept(self, membership: Membership) -> Kept:
        """What a member may have."""
        return self._kept[membership.share]

    def leave(self, memberships: Iterable[Membership]) -> None:
        """Members have unmapped it, or are gone."""
        for each in memberships:
            if each.share.members == [each.member]:
                # The memory goes before it can be leased again.
                kept = self._kept.pop(each.share)
                self._promised -= len(kept.extents)
                kept.close()
            each.books.shares.leave(each.share, each.member)
        self._broker.tick()

    def close(self) -> None:
        """Closes all."""
        for kept in self._kept.values():
            kept.close()
        self._kept.clear()

    def _account(self, process: Process, wanted: Publish) -> tuple[Books, Holder]:
        if (books := self._broker.books.get(wanted.device)) is not None:
            for holder in books.accounts.holders.values():
                theirs = holder.session.process
                if (theirs.pid, theirs.start, holder.name) == (process.pid, process.start, wanted.account):
                    return books, holder
        raise InvalidArgument(
            f"process {process.pid} has no account '{wanted.account}' on device {wanted.device} of this "
            f"broker; share from an arena that it serves"
        )


def close_all(descriptors: Iterable[int]) -> None:
    """Closes descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
