"""One contender of bench_train: trains a model when asked, and says how fast and in how much memory."""

from __future__ import annotations

import gc
import hashlib
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import msgspec
import torch

import torch_elastic_mem as tem
from benchmarks.contenders import Stage
from benchmarks.drip import Drip
from benchmarks.train_models import Job, make_job
from benchmarks.worker import Handler, serve
from torch_elastic_mem import _C

# More than a recording needs, so that none of it is lost.
_RECORDED_EVENTS = 500_000


class TrainRequest(msgspec.Struct):
    """A turn: which model, the length of each step, and what happens beside it."""

    model: str
    lengths: list[int]
    warmup: int
    batch: int | None = None
    drip_bytes: int = 0
    drip_period: float = 0.1
    peak: int = 0
    record: str = ""


class Clock:
    """Times steps without waiting for them: by events on a GPU."""

    def __init__(self, on_cuda: bool) -> None:
        self._on_cuda = on_cuda
        self._marks: list[Any] = []

    def start(self) -> None:
        """From here on; waits for what came before."""
        self._wait()
        self._start = time.perf_counter()
        self.mark()

    def mark(self) -> None:
        """A step has been queued."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def finish(self) -> tuple[float, list[float]]:
        """Waits for the last step. Seconds in all, and milliseconds between marks."""
        self._wait()
        seconds = time.perf_counter() - self._start
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._on_cuda:
            return seconds, [before.elapsed_time(after) for before, after in pairs]
        return seconds, [(after - before) * 1e3 for before, after in pairs]

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()


class TrainWorker:
    """Turns of one contender."""

    def __init__(self, contender: str, backend: str) -> None:
        self._stage = Stage(contender, backend)
        self._streams: tuple[int, int] | None = None
        # A training launches one kernel after the other: by default the drip would get the GIL 5 ms late.
        sys.setswitchinterval(5e-4)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Trains from the first weights, with an empty cache, and leaves nothing behind."""
        turn = msgspec.convert(request, TrainRequest)
        try:
            return self._turn(turn)
        finally:
            gc.collect()
            self._stage.reset()

    def _turn(self, turn: TrainRequest) -> dict[str, Any]:
        stage = self._stage
        stage.reset()
        retries = stage.retries()
        if turn.record:
            torch.cuda.memory._record_memory_history("all", context=None, max_entries=_RECORDED_EVENTS)
        job = make_job(turn.model, stage.device, turn.batch)
        drip = self._drip(turn)
        with drip.running(turn.peak) if drip else nullcontext():
            seconds, spans, losses = _run(job, turn.lengths, turn.warmup, stage.on_cuda)
        if turn.record:
            torch.cuda.memory._dump_snapshot(turn.record)
            torch.cuda.memory._record_memory_history(None)
        reserved, allocated = stage.peaks()
        return {
            "uuid": stage.uuid(),
            "seconds": seconds,
            "per_second": sum(map(job.samples, turn.lengths[turn.warmup :])) / seconds,
            "step_ms": statistics.median(spans),
            "steps_ms": spans,
            "reserved": reserved,
            "allocated": allocated,
            "retries": stage.retries() - retries,
            "loss": losses[-1].hex(),
            "losses": hashlib.sha256(" ".join(loss.hex() for loss in losses).encode()).hexdigest()[:16],
            "drip": msgspec.to_builtins(drip.figures()) if drip else None,
        }

    def _drip(self, turn: TrainRequest) -> Drip | None:
        stage = self._stage
        if not turn.drip_bytes:
            return None
        if stage.arena is None or stage.account is None:
            raise tem.InvalidArgument("a drip needs an arena; this contender has none")
        return Drip(stage.arena, stage.account, turn.drip_bytes, turn.drip_period, self._two_streams())

    def _two_streams(self) -> tuple[int, int]:
        if self._streams is None:
            if self._stage.on_cuda:
                self._kept = [torch.cuda.Stream(), torch.cuda.Stream()]
                self._streams = self._kept[0].cuda_stream, self._kept[1].cuda_stream
            else:
                self._streams = _C.host_stream_create(), _C.host_stream_create()
        return self._streams


def _run(
    job: Job, lengths: Sequence[int], warmup: int, on_cuda: bool
) -> tuple[float, list[float], list[float]]:
    """Trains step by step; seconds and milliseconds of the steps after `warmup`, and every loss."""
    clock = Clock(on_cuda)
    losses = []
    for number, length in enumerate(lengths):
        if number == warmup:
            clock.start()
        losses.append(job.step(length))
        if number >= warmup:
            clock.mark()
    seconds, spans = clock.finish()
    return seconds, spans, torch.stack(losses).double().tolist()


def make(contender: str, backend: str) -> Handler:
    """A worker for a contender."""
    return TrainWorker(contender, backend)


if __name__ == "__main__":
    serve(make)
