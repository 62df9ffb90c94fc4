"""The account of a share: what its publisher lets go while others have it mapped."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.state import AccountState


@dataclass(slots=True, eq=False)
class Heir(Holder):
    """A holder that nobody can ask: its bytes are free when the last member leaves, and not before.

    Attributes:
        size: of the share, in bytes.
    """

    size: int = 0

    @property
    def can_answer(self) -> bool:
        """Nobody is there to give anything."""
        return False

    def inherits(self, left: int) -> int:
        """Bytes to take over when the publisher's account has `left`, so that the two make up the size."""
        return max(0, self.size - left - self.lease)

    def state(self, now: float, waiting: int, asked: bool, owed: int) -> AccountState:
        """Its figures. All it holds is in use."""
        # `super()` knows another class by this name: dataclasses make one anew for the slots.
        found = Holder.state(self, now, waiting, asked, owed)
        return msgspec.structs.replace(found, state="ok", held=self.lease)
