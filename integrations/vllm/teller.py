"""Tells people what is in an engine's blocks: `tem top` shows it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from torch_elastic_mem.errors import TemError
from torch_elastic_mem.integrations.vllm.balloon import Counts

log = logging.getLogger("vllm.torch_elastic_mem")

# Blocks are counted one by one, a millisecond for some ten thousand. So it is done on a thread of its own,
# while the engine waits for the device, and no more often.
EVERY = 1.0


class Listener(Protocol):
    """Whom it is told."""

    def note_blocks(self, in_use: int, cached: int, free: int, parked: int) -> None:
        """May raise TemError once nobody listens any more."""


class Counted(Protocol):
    """Whose blocks they are."""

    def counts(self, between: Callable[[], object]) -> Counts:
        """Needs no lock."""


class Teller:
    """The thread. It ends by itself when nobody listens any more."""

    def __init__(self, listener: Listener, counted: Counted, every: float = EVERY) -> None:
        self._listener = listener
        self._counted = counted
        self._every = every
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tem-tell", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join(10)

    def _run(self) -> None:
        told = None
        try:
            while True:
                # The interpreter's lock goes to the engine's thread at once, where it wants it.
                counts = self._counted.counts(lambda: time.sleep(0))
                if counts != told:
                    told = counts
                    self._listener.note_blocks(counts.in_use, counts.cached, counts.free, counts.parked)
                if self._closed.wait(self._every):
                    return
        except TemError:
            return  # the account is closed
        except Exception:
            log.exception("what is in the engine's blocks is not shown any more")
