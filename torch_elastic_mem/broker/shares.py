"""Who shares what of one device. Pure: descriptors and connections are the server's.

A share is charged once. Its bytes are leased to an account of its publisher, which gives them back by the
tenants' socket like any others; while the share lives, what is given back goes to an account of the share's
own (its heir), in the same step. So publisher and heir together hold the size, whoever dies when, until the
last member has left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch_elastic_mem.broker.accounts import Accounts
from torch_elastic_mem.broker.heir import Heir
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.protocol import Limits
from torch_elastic_mem.broker.rules import NotPermitted, for_ledger
from torch_elastic_mem.broker.session import Process, Session
from torch_elastic_mem.broker.state import SharedState, SharerState
from torch_elastic_mem.errors import InUseError, InvalidArgument
from torch_elastic_mem.units import format_bytes

# So that the account's name, "share NAME", is one too.
LONGEST_NAME = 48


@dataclass(slots=True, eq=False)
class Member:
    """A process that has a share mapped, once for each time that it attached.

    Attributes:
        name: what the process calls itself.
    """

    process: Process
    name: str


@dataclass(slots=True, eq=False)
class Share:
    """Memory that several processes have mapped.

    Attributes:
        bytes: its size. heir: its own account. publisher: the number of the account it came from.
    """

    name: str
    uid: int
    bytes: int
    publisher: int
    heir: Heir
    members: list[Member] = field(default_factory=list)

    def state(self) -> SharedState:
        """Who has it, and the part of it that each counts for."""
        part, rest = divmod(self.bytes, len(self.members))
        return SharedState(
            name=self.name,
            uid=self.uid,
            bytes=self.bytes,
            members=[
                SharerState(
                    pid=each.process.pid, uid=each.process.uid, process=each.name, share=part + (i < rest)
                )
                for i, each in enumerate(self.members)
            ],
        )


class Shares:
    """The shares of one device. Sizes are bytes."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._shares: dict[str, Share] = {}

    def __iter__(self) -> Iterator[Share]:
        return iter(self._shares.values())

    def check(self, name: str, uid: int, bytes: int, publisher: Holder) -> None:
        """Refuses what cannot be published.

        Raises:
            InvalidArgument: no name, no bytes, or more than the account holds.
            InUseError: the name is taken, or the account has a share.
        """
        if not 0 < len(name.encode()) <= LONGEST_NAME:
            raise InvalidArgument(f"a share has a name of 1 to {LONGEST_NAME} bytes; got {name!r}")
        if not 0 < bytes <= publisher.lease:
            raise InvalidArgument(
                f"account '{publisher.title}' has {format_bytes(publisher.lease)}, and cannot share "
                f"{format_bytes(bytes)}"
            )
        if (taken := self._shares.get(name)) is not None:
            raise InUseError(
                f"'{name}' is shared already, {format_bytes(taken.bytes)} by {_who(taken)}; attach to it, or "
                f"take another name"
            )
        if publisher.id in self._accounts.heirs:
            raise InUseError(f"account '{publisher.title}' has a share already; open one for each")

    def publish(self, name: str, bytes: int, publisher: Holder, member: Member) -> Share:
        """Begins a share, with its publisher as the first member.

        Raises:
            TemError: as for `check`.
        """
        uid = member.process.uid
        self.check(name, uid, bytes, publisher)
        heir = self._heir(name, uid, bytes, publisher)
        share = self._shares[name] = Share(name, uid, bytes, publisher.id, heir, [member])
        self._accounts.set_heir(publisher.id, heir)
        return share

    def join(self, name: str, member: Member) -> Share:
        """Makes a process a member.

        Raises:
            InvalidArgument: there is no such share. NotPermitted: it is another user's.
        """
        share, uid = self._shares.get(name), member.process.uid
        if share is None:
            known = ", ".join(f"'{each.name}'" for each in self if each.uid == uid) or "none"
            raise InvalidArgument(
                f"nobody shares '{name}' here; user {uid} has {known}; share it first, also after a restart "
                f"of the broker"
            )
        if share.uid != uid:
            raise NotPermitted(
                f"'{name}' belongs to user {share.uid}, and user {uid} asks for it; have both run as one user"
            )
        share.members.append(member)
        return share

    def leave(self, share: Share, member: Member) -> bool:
        """A member has unmapped it, or is gone. True if it was the last, and the share has ended."""
        share.members.remove(member)
        if share.members:
            return False
        del self._shares[share.name]
        # What the publisher still holds stays its own.
        self._accounts.set_heir(share.publisher, None)
        self._accounts.discharge(share.heir, share.heir.lease)
        self._accounts.close(share.heir)
        return True

    def states(self) -> list[SharedState]:
        """All of them, at this moment."""
        return [share.state() for share in self]

    def _heir(self, name: str, uid: int, bytes: int, publisher: Holder) -> Heir:
        limits = Limits(publisher.limits.value, weight=publisher.limits.weight)
        title = f"share {name}"
        number = self._accounts.ledger.open(f"{title} (mapped by several)", for_ledger(limits))
        # The broker is the process that keeps it.
        session = Session(Process(os.getpid(), uid, 0), "shared")
        priority, ledger = publisher.priority, self._accounts.ledger
        heir = Heir(ledger, number, title, session, priority, limits, priority, limits, size=bytes)
        heir.connected = False
        self._accounts.holders[number] = heir
        return heir


def _who(share: Share) -> str:
    return ", ".join(f"{each.name}/{each.process.pid}" for each in share.members)
