"""One rank's side of its engine's memory: it carries out what the scheduler orders, and passes demands on."""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial

from torch_elastic_mem.account import Group, Reclaimer
from torch_elastic_mem.errors import TemError
from torch_elastic_mem.integrations.vllm import line
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.line import Line

log = logging.getLogger("vllm.torch_elastic_mem")


class Rank:
    """Between one rank's cache and the scheduler. Thread-safe.

    Args:
        cache: its memory.
        caller: the line to the scheduler.
        group: a growth of it under a broker; None where each rank has its device to itself.
    """

    def __init__(self, cache: ElasticCache, caller: Line, group: Group | None) -> None:
        self._cache = cache
        self._line = caller
        self._group = group
        self._changed = threading.Condition()  # all below are guarded by it
        self._begun = 0  # the step that the worker is about to give to the stream, or has given
        self._enqueued = 0  # the last whose work the stream has
        self._due: list[line.Release] = []  # in the order they came
        self._grown: line.Grow | None = None  # the last growth, if it brought memory
        self._undone = 0  # the last growth that is not wanted any more
        self._gone = 0  # chunks that have been let go, since the beginning
        self._target = 0  # what demands have asked for, in the same count
        self._open: dict[int, threading.Event] = {}  # demands that have not been answered
        self._demands = 0
        self._reclaimers: list[Reclaimer] = []
        self._closed = False
        self._growths: queue.SimpleQueue[line.Grow | None] = queue.SimpleQueue()
        cache.on_enqueued = self.step_enqueued
        self._growing = threading.Thread(target=self._grow, name="tem-rank", daemon=True)
        for thread in (threading.Thread(target=self._hear, name="tem-rank", daemon=True), self._growing):
            thread.start()

    def step_begins(self, number: int) -> None:
        """The worker's thread is about to run a step; all before it is on the stream."""
        self._cache.use_stream()
        with self._changed:
            self._begun = number
            self._reach(number - 1)

    def step_enqueued(self) -> None:
        """The stream has all of the step's work."""
        with self._changed:
            self._reach(self._begun)

    def close(self) -> None:
        """Nobody is asked any more, and nothing grows. Harmless the second time."""
        self._line.close()
        self._end()

    def _hear(self) -> None:
        try:
            for message in self._line.messages():
                self._heed(message)
        finally:
            self.close()

    def _heed(self, message: line.Message) -> None:
        match message:
            case line.Grow():
                self._growths.put(message)
            case line.Release():
                with self._changed:
                    self._due.append(message)
                    self._reach(self._enqueued)
            case line.Undo(number):
                with self._changed:
                    self._undone = max(self._undone, number)
                    if self._grown is not None and self._grown.number == number:
                        self._let_go(self._grown.chunks)
                        self._grown = None
            case line.Served(number):
                with self._changed:
                    if number in self._open:
                        self._open[number].set()
            case line.Listen(rung):
                asked = self._cache.account.on_reclaim(partial(self._asked, rung), rung)
                with self._changed:
                    self._reclaimers.append(asked)
            case line.Blocks():
                with suppress(TemError):  # nobody listens any more
                    self._cache.account.note_blocks(
                        message.in_use, message.cached, message.free, message.parked
                    )

    def _end(self) -> None:
        with self._changed:
            self._closed = True
            reclaimers, self._reclaimers = self._reclaimers, []
            for event in self._open.values():
                event.set()
            self._changed.notify_all()
        self._growths.put(None)
        for each in reclaimers:
            each.remove()

    def _reach(self, step: int) -> None:
        """Carries out the releases that are due when the stream has this step's work."""
        self._enqueued = max(self._enqueued, step)
        later = []
        for order in self._due:
            if order.step > self._enqueued:
                later.append(order)
                continue
            self._let_go(order.chunks)
            self._gone += order.yielded
        self._due = later
        self._changed.notify_all()

    def _let_go(self, chunks: list[int]) -> None:
        try:
            self._cache.release(chunks)
        except Exception:
            log.exception("the memory of %d chunks is not released", len(chunks))

    def _grow(self) -> None:
        while (order := self._growths.get()) is not None:
            # A chunk that is to come again may not have gone yet: it goes behind a step that is under way.
            with self._changed:
                while not self._closed and self._going(order.chunks):
                    self._changed.wait()
                if self._closed:
                    return
                self._grown = None
            refusal = self._refusal(order)
            with self._changed:
                if refusal is None and order.number <= self._undone:
                    self._let_go(order.chunks)
                elif refusal is None:
                    self._grown = order
            self._line.send(line.Grown(order.number, refusal))

    def _refusal(self, order: line.Grow) -> str | None:
        """Why these chunks have no memory; None if they have."""
        try:
            with self._leased(order):
                self._cache.ensure(order.chunks, order.rung, order.timeout)
            return None
        except TemError as reason:
            return str(reason)
        except Exception as reason:
            log.exception("the KV cache does not grow")
            return repr(reason)

    def _going(self, chunks: list[int]) -> bool:
        return any(not set(order.chunks).isdisjoint(chunks) for order in self._due)

    def _leased(self, order: line.Grow) -> AbstractContextManager[object]:
        """Under a broker all ranks are granted their bytes together: none waits with its own in hand."""
        if self._group is None or not order.chunks:
            return nullcontext()
        return self._cache.account.reserve(
            self._cache.bytes_under(order.chunks),
            group=replace(self._group, round=order.number),
            timeout=order.timeout,
            rung=order.rung,
        )

    def _asked(self, rung: str, nbytes: int, timeout: float) -> None:
        """Passes a demand on the rank's account on to the scheduler, and waits until it has been met.

        What is ordered to go and has not gone is part of it, as long as nobody else waits for that here.
        """
        own = threading.current_thread() is self._growing
        if own and rung != "evict":
            return  # as an engine of one rank: it pauses nobody in order to grow
        deadline = time.monotonic() + timeout
        served = threading.Event()
        with self._changed:
            if self._closed:
                return
            self._demands += 1
            number = self._demands
            self._open[number] = served
            self._target = max(self._target, self._gone) + -(-nbytes // self._cache.freed_bytes)
            demand = line.Demand(number, rung, self._target, timeout, own)
        self._line.send(demand)
        served.wait(timeout)
        with self._changed:
            # What was given may be behind a step whose work is not on the stream yet.
            self._changed.wait_for(
                lambda: self._closed or not self._due, max(0.0, deadline - time.monotonic())
            )
            del self._open[number]
            if not self._open:
                self._target = 0
