"""Gets memory for chunks on a thread of its own, so that no step waits for the driver or for who yields."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from torch_elastic_mem.errors import OutOfMemory, TemError

log = logging.getLogger("vllm.torch_elastic_mem")

# After a refusal nothing is asked for this long, unless memory is seen to have come free: whoever holds it
# has just been asked for it. Who is refused what is cheap over and over rests longer each time, up to a
# bound: it has cached blocks of its own to use, and others' demands wait behind its own.
REST, LONGEST_REST = 0.1, 0.8
# The dearest that others may be asked for: what is unused and cached of lower classes, while an engine would
# rather not give up what it has cached itself; everything, once it has not even that.
WARM, SHORT = "evict", "pause"
# What is cheap comes at once or not now. Who becomes short meanwhile waits until it is refused.
BRIEF = 0.05
# Chunks mapped by one call; each call is all or nothing.
BATCH = 4


class Memory(Protocol):
    """What gives memory to chunks, all of them or none."""

    def ensure(self, chunks: list[int], rung: str, timeout: float | None) -> None:
        """Raises OutOfMemory where there is none in so many seconds, others asked up to that rung."""

    def room(self) -> int:
        """Bytes that are to be had without asking anybody, as far as this process knows."""


class Grower:
    """The thread, what it was asked for, and what it got. Thread-safe.

    Args:
        memory: raises OutOfMemory where there is none.
        on_done: called by the thread when it has got memory or was refused.
    """

    def __init__(self, memory: Memory, on_done: Callable[[], None] = lambda: None) -> None:
        self._memory = memory
        self._on_done = on_done
        self._changed = threading.Condition()
        self._asked: list[int] = []  # all below are guarded by the condition
        self._at_work: list[int] = []
        self._ready: list[int] = []
        self._short = False
        self._again = 0  # refusals of what is cheap after the first, with nothing between them
        self._refused_at = -REST
        self._refused = self._refused_short = False
        self._room = 0  # that there was when it was refused
        self._closed = False
        self.refusals = 0
        self._said = False
        self._thread = threading.Thread(target=self._run, name="tem-grow", daemon=True)
        self._thread.start()

    @property
    def coming(self) -> list[int]:
        """Chunks that were asked for and have not been taken yet."""
        with self._changed:
            return [*self._asked, *self._at_work, *self._ready]

    @property
    def working(self) -> bool:
        """Whether memory is on its way, which may have been granted already."""
        with self._changed:
            return bool(self._at_work)

    @property
    def here(self) -> bool:
        """Whether the calling thread is the one that gets memory."""
        return threading.current_thread() is self._thread

    def resting(self, short: bool = False) -> bool:
        """Whether memory has just been refused to one in such a need."""
        rest = REST if short else min(REST * 2**self._again, max(REST, LONGEST_REST))
        return self.refused(short) and time.monotonic() - self._refused_at < rest

    def refused(self, short: bool = False) -> bool:
        """Whether whoever is in such a need was refused memory, and none has come, or come free, since."""
        with self._changed:
            refused, room = self._refused and (self._refused_short or not short), self._room
        return refused and self._memory.room() <= room

    def ask(self, chunks: list[int], short: bool = False) -> None:
        """Wants memory under these chunks; `take` brings those that have it.

        Args:
            chunks: which.
            short: there is nothing else that the engine could use.
        """
        with self._changed:
            self._asked += chunks
            self._short |= short
            self._changed.notify_all()

    def take(self) -> list[int]:
        """Chunks that have memory now; they are the caller's from here on.

        Every step asks: what is put there just as it looks is for the next.
        """
        if not self._ready:
            return []
        with self._changed:
            taken, self._ready = self._ready, []
            return taken

    def keep(self, count: int, short: bool) -> None:
        """Wants so many chunks in all of what is coming, and no more: whoever needed them may have gone.

        Args:
            count: how many.
            short: there is nothing else that the engine could use.
        """
        if not self._asked:
            return  # every step asks
        with self._changed:
            del self._asked[max(0, count - len(self._at_work) - len(self._ready)) :]
            self._short &= short and bool(self._asked)

    def cancel(self) -> None:
        """Forgets what has not been begun."""
        with self._changed:
            self._forget()

    def wait(self, seconds: float) -> None:
        """Until something is ready or refused or nothing is asked for, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or not (self._asked or self._at_work), seconds)

    def settle(self, seconds: float) -> None:
        """Forgets what has not been begun, and waits until the rest has come or was refused."""
        with self._changed:
            self._forget()
            self._changed.wait_for(lambda: not self._at_work, seconds)

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        with self._changed:
            self._closed = True
            self._forget()
            self._changed.notify_all()
        self._thread.join(10)

    def _forget(self) -> None:
        self._asked.clear()
        self._short = False

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._closed)
                if self._closed:
                    return
                chunks, self._asked = self._asked[:BATCH], self._asked[BATCH:]
                self._at_work, short = chunks, self._short
                self._short = short and bool(self._asked)
            got = self._grow(chunks, *((SHORT, None) if short else (WARM, BRIEF)))
            room = self._seen_room()
            with self._changed:
                self._at_work = []
                again = self._refused and not self._refused_short and room <= self._room
                self._again = min(self._again + 1, 8) if again and not short and not got else 0
                self._room = room
                self._ready += got
                self._refused = len(got) < len(chunks)
                if self._refused:
                    if self._short and not short:
                        # Who has become short meanwhile wants these the more.
                        self._asked = [*chunks[len(got) :], *self._asked]
                    else:
                        # Not all of it is to be had: what else was asked for is not either.
                        self._forget()
                    self._refused_at, self._refused_short = time.monotonic(), short
                    self.refusals += 1
                elif not self._asked:
                    self._short = False
                self._changed.notify_all()
            try:
                self._on_done()
            except Exception:
                log.exception("a demand on the KV cache waits for the next step")

    def _seen_room(self) -> int:
        try:
            return self._memory.room()
        except TemError:  # its account is being closed
            return 0

    def _grow(self, chunks: list[int], rung: str, timeout: float | None) -> list[int]:
        """Those that got memory: all, or as many of the first as there is room for."""
        try:
            self._memory.ensure(chunks, rung, timeout)
            return chunks
        except OutOfMemory as error:
            # One that was refused what is cheap has cached blocks of its own to use.
            if rung == SHORT and not self._said:
                self._said = True
                log.warning("the KV cache does not grow for now: %s", error)
        except Exception:
            log.exception("the KV cache does not grow")
            return []
        got = []
        for chunk in chunks if len(chunks) > 1 else ():
            if rung == WARM and self._short:
                break  # these will be asked for dearly
            try:
                # Who could yield has been waited for: what they gave is free. Others wait for this to end.
                self._memory.ensure([chunk], rung, BRIEF)
            except OutOfMemory:
                break
            except Exception:
                log.exception("the KV cache does not grow")
                break
            got.append(chunk)
        return got
