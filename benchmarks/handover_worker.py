"""A process of bench_handover: it holds memory that is idle, trains, or takes what others have.

Requests name an operation, which is a method, and its arguments.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from typing import Any

import torch

import torch_elastic_mem as tem
from benchmarks.train_models import make_job
from benchmarks.worker import Handler, serve
from torch_elastic_mem import _C
from torch_elastic_mem.elastic_range import ElasticRange

TAKER, HOLDER, TRAINER = "taker", "holder", "trainer"
CLASSES = {TAKER: "serving", HOLDER: "idle", TRAINER: "training"}
MIB = 1 << 20
# Waited for before a demand that cannot be met is given up: a fill ends with one.
_FILL_SECONDS = 0.05
_TAKE_SECONDS = 10.0
_STEPS_A_LOOK = 8


class HandoverWorker:
    """What every one of them can: open and close."""

    def __init__(self, role: str, backend: str) -> None:
        self._role = role
        self._backend = backend

    def __call__(self, request: dict[str, Any]) -> Any:
        """Does what a request says."""
        return getattr(self, request.pop("op"))(**request)

    def open(self, path: str) -> dict[str, int]:
        """Connects to the broker."""
        timeout = _TAKE_SECONDS if self._role == TAKER else _FILL_SECONDS
        self.arena = tem.Arena(self._backend, broker=path, yield_timeout=timeout)
        self.account = self.arena.account(self._role, CLASSES[self._role])
        return {"capacity": self.arena.capacity}


class Taker(HandoverWorker):
    """Takes memory, and says how long it took."""

    def take(self, nbytes: int) -> dict[str, int]:
        """Grows a range; ends when the memory is accessible."""
        self._memory = self.account.range(nbytes)
        start = time.perf_counter_ns()
        self._memory.grow(nbytes)
        return {"ns": time.perf_counter_ns() - start, "end": time.monotonic_ns()}

    def give(self) -> None:
        """Gives it back, and the lease that an account keeps for its next growth too."""
        self._memory.close()
        # What came from another process is still being zeroed.
        while True:
            try:
                self.account.close()
                break
            except tem.InUseError:
                time.sleep(1e-4)
        self.account = self.arena.account(self._role, CLASSES[self._role])


class Holder(HandoverWorker):
    """Holds whatever it can get, and nothing lives there."""

    def open(self, path: str) -> dict[str, int]:
        """Connects to the broker."""
        self._memory: ElasticRange | None = None
        opened = super().open(path)
        self._most = opened["capacity"]
        return opened

    def fill(self) -> int:
        """Takes what is free, and lets it idle; the bytes that it has then."""
        capacity = self.arena.capacity
        if self._memory is None:
            self._memory = self.account.range(capacity, keep=capacity)
        memory, step = self._memory, max(self._most, 2 * MIB)
        while step >= 2 * MIB and memory.mapped < capacity:
            try:
                memory.grow(min(step, capacity - memory.mapped))
            except tem.OutOfMemory:
                step //= 2
        self._most = memory.mapped
        memory.shrink(self._most)
        return memory.resident

    def empty(self) -> None:
        """Gives all of it back."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self.account.close()
        self.account = self.arena.account(self._role, CLASSES[self._role])

    def hold_gil(self, seconds: float) -> dict[str, int]:
        """Lets no thread of this process run Python for so long, soon after the answer."""
        spans = self._spans = {"start": 0, "end": 0}

        def hold() -> None:
            time.sleep(0.01)
            spans["start"] = time.monotonic_ns()
            # A PyDLL's functions are called with the GIL, as a C extension's are.
            ctypes.PyDLL(None).usleep(int(seconds * 1e6))
            spans["end"] = time.monotonic_ns()

        threading.Thread(target=hold).start()
        return spans

    def held(self) -> dict[str, int]:
        """From when to when that was."""
        while not self._spans["end"]:
            time.sleep(0.001)
        return self._spans


class Trainer(HandoverWorker):
    """Trains without a pause, beside a cache that it does not need."""

    def open(self, path: str) -> dict[str, int]:
        """Connects, and starts to train."""
        opened = super().open(path)
        self._filled = threading.Event()
        self._wanted = threading.Event()
        self._stop = False
        self._steps = 0
        self._error = ""
        self._core = self.account.allocator()
        if self.arena.backend == "cuda":
            allocator = tem.torch_allocator(self.arena.device, self.account)
            torch.cuda.memory.change_current_allocator(allocator)
            self._device = torch.device(self.arena.device)
            torch.cuda.set_device(self._device)
            self._stream = torch.cuda.Stream()
            self._filling = self._stream.cuda_stream
        else:
            torch.set_num_threads(1)
            self._device = torch.device("cpu")
            self._filling = _C.host_stream_create()
        self._thread = threading.Thread(target=self._train)
        self._thread.start()
        # By then the libraries have loaded their kernels, which takes memory that is not torch's.
        while self._steps < _STEPS_A_LOOK:
            self._check()
            time.sleep(0.01)
        return opened

    def fill(self) -> dict[str, int]:
        """Caches what is free, between two steps; returns after the next, when training has its memory."""
        self._filled.clear()
        self._wanted.set()
        while not self._filled.wait(0.1):
            self._check()
        stats = self._core.stats()
        kinds = {"reserved": "reserved_bytes", "allocated": "allocated_bytes"}
        return {name: stats[kind]["all"]["current"] for name, kind in kinds.items()}

    def steps(self) -> int:
        """How many it has made."""
        return self._steps

    def end(self) -> None:
        """Stops."""
        self._stop = True
        self._thread.join()

    def _check(self) -> None:
        if self._error:
            raise tem.TemError(self._error)

    def _train(self) -> None:
        try:
            with self.account.allocations():
                self._loop()
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits for a fill
            self._error = f"training failed: {type(error).__name__}: {error}"

    def _loop(self) -> None:
        on_cuda = self._device.type == "cuda"
        model, batch, length = ("gpt-124m", 8, 1024) if on_cuda else ("gpt-tiny", 2, 128)
        job = make_job(model, self._device, batch)
        while not self._stop:
            loss = job.step(length)
            self._steps += 1
            # Read as a training's log reads it, so that the CPU does not run away from the GPU.
            if self._steps % _STEPS_A_LOOK == 0:
                float(loss)
            if self._wanted.is_set():
                self._wanted.clear()
                self._cache()
                job.step(length)
                self._filled.set()
        del job
        gc.collect()

    def _cache(self) -> None:
        """All of it lives at once: so it is done where training asks for nothing meanwhile."""
        chunk = 64 * MIB if self._device.type == "cuda" else 4 * MIB
        blocks = []
        try:
            while True:
                blocks.append(self._core.allocate(chunk, self._filling))
        except tem.OutOfMemory:
            pass
        finally:
            for block in blocks:
                self._core.free(block)


def make(role: str, backend: str) -> Handler:
    """A worker for a role."""
    return {TAKER: Taker, HOLDER: Holder, TRAINER: Trainer}[role](role, backend)


if __name__ == "__main__":
    serve(make)
