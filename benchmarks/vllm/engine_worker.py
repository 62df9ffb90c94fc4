"""One contender of bench_engine or bench_step: a vLLM engine in this process, stock or on an arena."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from benchmarks.vllm import steady
from benchmarks.vllm.engine import Engine, Opening, prepare
from benchmarks.vllm.load import Load, run
from benchmarks.vllm.pace import Pace
from benchmarks.worker import Handler, serve

if TYPE_CHECKING:
    from collections.abc import Iterator


class Squeeze(msgspec.Struct):
    """Somebody of a higher class takes `nbytes` of the arena every `period` seconds, and gives them back."""

    nbytes: int
    period: float


class EngineWorker:
    """An engine and what is asked of it."""

    def __init__(self, contender: str) -> None:
        prepare(contender)
        self._engine: Any = None
        self._arena: Any = None

    def __call__(self, request: dict[str, Any]) -> Any:
        """Answers {"open": Opening}, {"load": Load, "squeeze": Squeeze}, {"steps": Batch}, {"idle": int}."""
        if "open" in request:
            return self._open(msgspec.convert(request["open"], Opening))
        if "idle" in request:
            return self._take(request["idle"])
        if "steps" in request:
            return msgspec.to_builtins(
                steady.run(self._whole, msgspec.convert(request["steps"], steady.Batch))
            )
        load = msgspec.convert(request["load"], Load)
        # The same requests once more would find the prefixes of an earlier turn.
        self._engine.reset_prefix_cache()
        squeeze = msgspec.convert(request.get("squeeze"), Squeeze | None)
        with self._squeezed(squeeze) as squeezes:
            seen = run(self._engine, load)
        return msgspec.to_builtins(seen) | {"squeezes": squeezes, "kernel": self._pace()}

    def _open(self, opening: Opening) -> dict[str, Any]:
        engine = Engine(opening)
        self._whole = engine
        self._engine, self._arena, self._cache = engine.llm, engine.arena, engine.cache
        self._pace = Pace(engine.worker.device)
        if engine.cache is not None:
            import torch_elastic_mem as tem

            # So much that the cache fits, and not much more: what others want, it has to yield.
            self._arena.set_capacity(min(self._arena.capacity, opening.kv_bytes + self._cache.chunk_bytes))
            self._other = self._arena.account("pressing", tem.PriorityClass("pressing", 10**6))
            self._range = self._other.range(2 * opening.kv_bytes)
        return engine.facts()

    def _take(self, nbytes: int) -> dict[str, Any]:
        """Takes so many bytes beyond what is free from the idle engine, and gives them back."""
        held = self._cache.resident_bytes
        wanted = self._other.room() + min(nbytes, held - self._cache.chunk_bytes)
        wanted -= wanted % self._arena.granularity
        start = time.perf_counter()
        self._range.grow(wanted, timeout=10.0)
        took = time.perf_counter() - start
        left = self._cache.resident_bytes
        self._range.shrink(wanted)
        return {"seconds": took, "held": held, "left": left, "taken": wanted}

    @contextmanager
    def _squeezed(self, squeeze: Squeeze | None) -> Iterator[list[dict[str, Any]]]:
        if squeeze is None:
            yield []
            return
        import torch_elastic_mem as tem

        found: list[dict[str, Any]] = []
        done = threading.Event()

        def press() -> None:
            while not done.wait(squeeze.period / 2):
                held = self._cache.resident_bytes
                start = time.perf_counter()
                try:
                    self._range.grow(squeeze.nbytes, timeout=2.0)
                except tem.OutOfMemory:
                    found.append({"met": False, "seconds": time.perf_counter() - start})
                    continue
                took = time.perf_counter() - start
                found.append({"met": True, "seconds": took, "yielded": held - self._cache.resident_bytes})
                done.wait(squeeze.period / 2)
                self._range.shrink(squeeze.nbytes)

        thread = threading.Thread(target=press)
        thread.start()
        try:
            yield found
        finally:
            done.set()
            thread.join()


def make(contender: str, backend: str) -> Handler:
    """A worker for a contender; vLLM knows its device itself."""
    return EngineWorker(contender)


if __name__ == "__main__":
    serve(make)
