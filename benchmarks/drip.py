"""A steady drip of yields: a higher class takes memory from a training that runs, and returns it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import msgspec

import torch_elastic_mem as tem
from torch_elastic_mem.elastic_range import ElasticRange

# A demand that finds the training at its peak is refused rather than waited for.
PATIENCE_S = 0.05


class DripFigures(msgspec.Struct):
    """What a drip did: demands met and refused, and what was yielded to them.

    Attributes:
        latencies_ms: of each demand that was met, until its memory was mapped.
        yields_ms: of each yield, until the training had given.
    """

    met: int
    refused: int
    latencies_ms: list[float]
    yields_ms: list[float]
    yielded: int


class Drip:
    """Takes `nbytes` for class "serving" every `period` seconds, and gives them back at once.

    Between two demands the training's cache is filled again with what is free, else only the first demand
    would find anything to be yielded. The filling has a stream of its own: what it has cached is idle, so the
    training takes from there what it needs. At no moment do training and drip together need more than the
    capacity, so the training is never refused.
    """

    def __init__(
        self, arena: tem.Arena, training: tem.Account, nbytes: int, period: float, streams: tuple[int, int]
    ) -> None:
        self._arena = arena
        self._training = training
        self._bytes = nbytes
        self._chunk = nbytes // 8
        # Room for what the training's blocks scatter more than they did undisturbed.
        self._slack = nbytes // 2
        self._period = period
        self._serving_stream, self._filling_stream = streams
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._latencies: list[float] = []
        self._refused = 0
        self._since = 0

    @contextmanager
    def running(self, peak: int) -> Iterator[None]:
        """Drips beside what runs within the block.

        Args:
            peak: the most that the training reserves undisturbed. The arena gets no more capacity than that
                and the drip need, so that a demand has to be yielded to.

        Raises:
            TemError: a demand failed for another reason than want of memory.
        """
        before = self._arena.capacity
        reserve = self._arena.snapshot().reserve_low
        self._since = max((record.seq for record in self._arena.yields()), default=0)
        with (
            self._arena.account("drip", "serving") as serving,
            closing(serving.range(self._bytes)) as memory,
        ):
            self._arena.set_capacity(min(before, peak + self._bytes + self._slack + reserve))
            # Reserved as at its peak from the start: what it had not reserved yet would be free for all.
            if (missing := peak - self._training.held) > 0:
                core = self._training.allocator()
                core.free(core.allocate(missing, 0))
            thread = threading.Thread(target=self._run, args=(memory,), name="drip")
            thread.start()
            try:
                yield
            finally:
                self._stop.set()
                thread.join()
                self._arena.set_capacity(before)
        if self._error is not None:
            raise self._error

    def figures(self) -> DripFigures:
        """What happened."""
        records = [record for record in self._arena.yields(self._since) if record.demander == "drip"]
        given = [record for record in records if record.given]
        return DripFigures(
            len(self._latencies),
            self._refused,
            self._latencies,
            [record.duration_ns / 1e6 for record in given],
            sum(record.given for record in given),
        )

    def _run(self, memory: ElasticRange) -> None:
        try:
            tick = time.monotonic()
            while not self._stop.is_set():
                self._fill()
                tick = max(tick + self._period, time.monotonic())
                if self._stop.wait(tick - time.monotonic()):
                    return
                self._take(memory)
        except BaseException as error:  # noqa: BLE001 - raised by running(), on the training's thread
            self._error = error

    def _take(self, memory: ElasticRange) -> None:
        start = time.perf_counter()
        try:
            memory.grow(self._bytes, stream=self._serving_stream, timeout=PATIENCE_S)
        except tem.OutOfMemory:
            self._refused += 1
            return
        self._latencies.append((time.perf_counter() - start) * 1e3)
        memory.shrink(self._bytes, stream=self._serving_stream)
        # It goes behind its fence.
        self._training.wait(self._bytes // 2, PATIENCE_S)

    def _fill(self) -> None:
        core = self._training.allocator()
        blocks: list[int] = []
        try:
            # Live together they stay under what a demand takes and half the slack.
            while self._training.room() >= self._chunk and len(blocks) < 10:
                blocks.append(core.allocate(self._chunk, self._filling_stream))
        except tem.OutOfMemory:
            pass  # the training was first
        finally:
            for block in blocks:
                core.free(block)
