"""What moved memory, in order: the last events of the machine, numbered without gaps."""

from __future__ import annotations

from collections import deque
from itertools import islice

from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.state import Event

KEPT = 65_536


class Journal:
    """The last events. Not thread-safe: it belongs to the broker's loop."""

    def __init__(self, kept: int = KEPT) -> None:
        self._events: deque[Event] = deque(maxlen=kept)
        self._last = 0
        self.grants = 0
        self.denials = 0
        self.asks = 0

    def add(
        self,
        kind: str,
        device: str,
        holder: Holder,
        start: float,
        end: float,
        *,
        bytes: int = 0,
        asked: int = 0,
        rung: str = "",
        demander: str = "",
    ) -> None:
        """Notes what happened to an account from `start` to `end`, seconds of the monotonic clock."""
        self._last += 1
        self._events.append(
            Event(
                seq=self._last,
                start_ns=int(start * 1e9),
                duration_ns=max(0, int((end - start) * 1e9)),
                kind=kind,
                device=device,
                pid=holder.session.process.pid,
                account=holder.name,
                bytes=bytes,
                asked=asked,
                rung=rung,
                demander=demander,
            )
        )

    def since(self, seq: int) -> list[Event]:
        """The events after number `seq` that are still kept, oldest first."""
        missing = self._last - max(seq, 0)
        return list(islice(self._events, max(0, len(self._events) - missing), None)) if missing > 0 else []
