"""One of the engines of bench_multi, in this process, stock or on an arena that others share."""

from __future__ import annotations

import os
import time
from importlib import import_module
from typing import Any

import msgspec

from benchmarks.vllm.engine import Engine, Opening, prepare
from benchmarks.vllm.load import Load, Seen, drive, run
from benchmarks.vllm.ramps import Ramp
from benchmarks.worker import Handler, serve


class Served(msgspec.Struct):
    """What an engine made of its part of a run.

    Attributes:
        preempted: requests that it preempted. moved: blocks that it moved.
        waited: seconds that its steps waited for memory.
        most_bytes: the most that its requests held of its cache after a step.
        cache_bytes: the most that its cache may hold.
    """

    seen: Seen
    preempted: int
    moved: int
    waited: float
    most_bytes: int
    cache_bytes: int


class MultiWorker:
    """An engine that starts its part of a run at a moment that is given."""

    def __init__(self, contender: str) -> None:
        self._contender = contender
        self._engine: Engine | None = None

    def __call__(self, request: dict[str, Any]) -> Any:
        """Answers {"open", "broker": path, "name": text}, {"load"}, {"ramp", "start"} or {"mapped"}."""
        if "open" in request:
            return self._open(msgspec.convert(request["open"], Opening), request["name"], request["broker"])
        assert self._engine is not None  # it is opened first
        if "mapped" in request:
            return kvcached_bytes(self._name)
        # The same prompts come once more in another pattern.
        self._engine.llm.reset_prefix_cache()
        if "load" in request:
            return msgspec.to_builtins(run(self._engine.llm, msgspec.convert(request["load"], Load)))
        ramp = msgspec.convert(request["ramp"], Ramp)
        return msgspec.to_builtins(self._serve(self._engine, ramp, request["start"]))

    def _open(self, opening: Opening, name: str, broker: str) -> dict[str, Any]:
        # kvcached's engines have nothing in common but the device.
        self._name = f"tem-bench-{name}"
        prepare(self._contender, TEM_NAME=name, TEM_BROKER=broker or "0", KVCACHED_IPC_NAME=self._name)
        self._opening = opening
        self._engine = Engine(opening)
        return self._engine.facts()

    def _serve(self, engine: Engine, ramp: Ramp, start: float) -> Served:
        most = 0

        def stepped() -> None:
            nonlocal most
            most = max(most, engine.in_use())

        arrivals = ramp.arrivals()
        if time.monotonic() > start:
            raise RuntimeError("the run was to have started already: its prompts took too long to draw")
        before = engine.preempted, engine.moved, engine.waited
        seen = drive(engine.llm, arrivals, start, stepped)
        preempted, moved = engine.preempted - before[0], engine.moved - before[1]
        waited = engine.waited - before[2]
        return Served(seen, preempted, moved, waited, most * engine.block_bytes, self._opening.kv_bytes)


def kvcached_bytes(name: str) -> int:
    """What kvcached has mapped in this process, in use and ahead of it, as it says in shared memory."""
    said = import_module("kvcached.cli.utils").get_kv_cache_limit(name)
    assert said is not None  # it was made with the engine
    return int(said.used_size + said.prealloc_size)


def make(contender: str, backend: str) -> Handler:
    """A worker for a contender; vLLM knows its device itself."""
    if backend == "host":
        # Each of three engines would otherwise bind a spinning thread to every core.
        os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    return MultiWorker(contender)


if __name__ == "__main__":
    serve(make)
