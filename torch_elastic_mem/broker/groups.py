"""Demands that are granted together or not at all, on several devices and by several processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch_elastic_mem.broker.need import Queued

# How long a late member of a round that has failed is told so, rather than waiting by itself.
REMEMBERED = 60.0

Key = tuple[int, str, int]


class Keeper(Protocol):
    """Who has a member's bytes: the books of its device."""

    def deliver(self, queued: Queued, now: float) -> None:
        """Sends the grant of a member whose bytes are charged."""

    def undo(self, queued: Queued, kind: int, reason: str, now: float) -> None:
        """Takes a member's bytes or its place in the queue back, and denies it."""


@dataclass(slots=True, eq=False)
class _Group:
    size: int
    members: dict[Queued, Keeper] = field(default_factory=dict)
    ready: set[Queued] = field(default_factory=set)


class Groups:
    """All groups of a machine that are not decided yet."""

    def __init__(self) -> None:
        self._groups: dict[Key, _Group] = {}
        self._failed: dict[Key, tuple[int, float]] = {}

    def join(self, queued: Queued, keeper: Keeper, now: float) -> str | None:
        """Adds a member. Returns why not, where it can be none."""
        key, size = self._key(queued), queued.demand.members
        if size == 0:
            return f"group '{queued.demand.group}' has no members; say how many it has"
        left, until = self._failed.pop(key, (0, 0.0))
        if left and now < until:
            if left > 1:
                self._failed[key] = left - 1, until
            return (
                f"another member of group '{queued.demand.group}' was denied in round {queued.demand.round}"
            )
        group = self._groups.setdefault(key, _Group(size))
        if group.size != size:
            return (
                f"group '{queued.demand.group}' has {group.size} members to one of them, and {size} to this "
                f"one; say the same"
            )
        if len(group.members) == size:
            return (
                f"group '{queued.demand.group}' has its {size} members in round {queued.demand.round}; take "
                f"another round"
            )
        group.members[queued] = keeper
        return None

    def prepared(self, queued: Queued, now: float) -> None:
        """A member's bytes are charged. The last of them sends all grants."""
        key = self._key(queued)
        group = self._groups[key]
        group.ready.add(queued)
        if len(group.ready) == group.size:
            del self._groups[key]
            for member, keeper in group.members.items():
                keeper.deliver(member, now)

    def fail(self, queued: Queued, kind: int, now: float) -> None:
        """A member was denied or is gone: so are the others."""
        key = self._key(queued)
        group = self._groups.pop(key, None)
        if group is None:
            return
        self._failed = {other: kept for other, kept in self._failed.items() if now < kept[1]}
        if (missing := group.size - len(group.members)) > 0:
            self._failed[key] = missing, now + REMEMBERED
        words = (
            f"another member of group '{queued.demand.group}', {queued.holder.title}, did not get its "
            f"memory, so none of the group does; try again"
        )
        for member, keeper in group.members.items():
            if member is not queued:
                keeper.undo(member, kind, words, now)

    @staticmethod
    def _key(queued: Queued) -> Key:
        return queued.holder.session.process.uid, queued.demand.group, queued.demand.round
