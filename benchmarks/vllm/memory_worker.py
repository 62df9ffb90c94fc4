"""The engine of bench_memory, in this process: serves requests while its memory is looked at."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

import torch_elastic_mem as tem
from benchmarks.residency import Curve, Figures, Residency
from benchmarks.traces import Request
from benchmarks.vllm.engine import OURS, Engine, Opening, prepare
from benchmarks.vllm.load import Arrival, drawn, drive
from benchmarks.worker import Handler, serve

# Between two looks at the memory.
LOOK = 0.05
# How long an idle engine is left alone before its memory is read.
QUIET = 2.0


class Trace(msgspec.Struct):
    """Requests to serve, and how.

    Attributes:
        taken_every: seconds after which all is taken that costs no request, again and again; 0: never.
        compacted: whether blocks of requests are moved for that.
    """

    requests: list[Request]
    seed: int
    vocabulary: int
    taken_every: float
    compacted: bool

    def arrivals(self) -> list[Arrival]:
        """The requests, with prompts of their own: no prefix is of use to another."""
        rng = random.Random(self.seed)
        return [
            Arrival(
                each.arrival, f"{self.seed}-{number}", drawn(rng, each.prompt, self.vocabulary), each.output
            )
            for number, each in enumerate(self.requests)
        ]


class Held(msgspec.Struct):
    """What an engine held while it served a trace.

    Attributes:
        used: mapped beside what requests held. kept: beside that and the prefixes that were cached.
        curve: of `used`.
        requests: how many were served. preempted: how often one was preempted.
        moved: blocks that were moved.
        idle: bytes mapped when all had been served. emptied: and when a higher class had taken what it could.
    """

    used: Figures
    kept: Figures
    curve: Curve
    requests: int
    seconds: float
    preempted: int
    moved: int
    idle: int
    emptied: int


class MemoryWorker:
    """An engine, and somebody of a higher class who can take its memory."""

    def __init__(self) -> None:
        prepare(OURS)
        self._engine: Any = None

    def __call__(self, request: dict[str, Any]) -> Any:
        """Answers {"open": Opening} or {"trace": Trace}."""
        if "open" in request:
            return self._open(msgspec.convert(request["open"], Opening))
        return msgspec.to_builtins(self._serve(msgspec.convert(request["trace"], Trace)))

    def _open(self, opening: Opening) -> dict[str, Any]:
        engine = self._engine = Engine(opening)
        # So much that the cache fits, and not much more: what others want, it has to yield.
        room = opening.kv_bytes + engine.cache.chunk_bytes
        engine.arena.set_capacity(min(engine.arena.capacity, room))
        other = engine.arena.account("pressing", tem.PriorityClass("pressing", 10**6))
        self._range = other.range(2 * opening.kv_bytes)
        return engine.facts() | {"block_bytes": engine.block_bytes, "kv_bytes": opening.kv_bytes}

    def _serve(self, trace: Trace) -> Held:
        engine = self._engine
        engine.llm.reset_prefix_cache()
        self._take_all()
        arrivals, preempted, moved = trace.arrivals(), engine.preempted, engine.moved
        with (
            self._moving(trace.compacted),
            self._looked_at() as (used, kept),
            self._taken(trace.taken_every),
        ):
            seen = drive(engine.llm, arrivals, time.monotonic())
        if seen.short:
            raise RuntimeError(f"{seen.short} requests did not get all their tokens")
        time.sleep(QUIET)
        idle = engine.cache.resident_bytes
        self._take_all()
        return Held(
            used.figures(),
            kept.figures(),
            used.curve(),
            len(arrivals),
            seen.seconds,
            engine.preempted - preempted,
            engine.moved - moved,
            idle,
            self._left,
        )

    @contextmanager
    def _moving(self, compacted: bool) -> Iterator[None]:
        elastic = self._engine.scheduler.elastic
        mover = elastic.mover
        if not compacted:
            elastic.mover = None
        try:
            yield
        finally:
            elastic.mover = mover

    @contextmanager
    def _looked_at(self) -> Iterator[tuple[Residency, Residency]]:
        used, kept = Residency(), Residency()
        elastic, cache, block = self._engine.scheduler.elastic, self._engine.cache, self._engine.block_bytes
        done, start = threading.Event(), time.monotonic()

        def look() -> None:
            while True:
                with elastic.lock:
                    counts = elastic.balloon.counts()
                    mapped = cache.resident_bytes
                now = time.monotonic() - start
                used.add(now, counts.in_use * block, mapped)
                kept.add(now, (counts.in_use + counts.cached) * block, mapped)
                if done.wait(LOOK):
                    return

        with _alongside(look, done):
            yield used, kept

    @contextmanager
    def _taken(self, every: float) -> Iterator[None]:
        done, account = threading.Event(), self._engine.cache.account

        def take() -> None:
            while every and not done.wait(every):
                # An account above its `high` gives up what costs it no request; then it may grow again.
                account.set_limits(high=self._engine.cache.chunk_bytes, timeout=1.0)
                account.set_limits(high="max")

        with _alongside(take, done):
            yield

    def _take_all(self) -> None:
        """Takes all that the engine gives up, and gives it back."""
        step = self._engine.arena.capacity
        while step >= self._engine.arena.granularity:
            try:
                self._range.grow(step, timeout=2.0)
            except tem.OutOfMemory:
                step = step // 2 // self._engine.arena.granularity * self._engine.arena.granularity
        self._left = self._engine.cache.resident_bytes
        self._range.shrink(self._range.mapped)


@contextmanager
def _alongside(work: Any, done: threading.Event) -> Iterator[None]:
    """Runs `work` on a thread of its own, which ends soon after `done` is set."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def make(contender: str, backend: str) -> Handler:
    """A worker; vLLM knows its device itself."""
    return MemoryWorker()


if __name__ == "__main__":
    serve(make)
