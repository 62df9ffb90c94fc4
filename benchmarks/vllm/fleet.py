"""Three engines on one device, each a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import msgspec

from benchmarks.broker_process import BrokerProcess
from benchmarks.terminal import progress
from benchmarks.vllm.engine import KVCACHED, OURS, Opening
from benchmarks.vllm.load import Load
from benchmarks.vllm.ramps import Ramp
from benchmarks.worker import ROOT, Worker, WorkerError
from torch_elastic_mem.device import device_of

STARTING = 500.0
# Until all engines have drawn their prompts and are ready for a run.
LEAD = 2.0
# Stays free on a GPU, as a broker's lower mark.
FREE = {"host": 0, "cuda": 256 << 20}


class Fleet:
    """The engines of one contender, started together.

    Args:
        contender: whose engines.
        backend: of the device.
        opening: of each engine; the bytes of its cache are set here.
        split: bytes of each engine's cache, for stock; None: they share them all. Ours through a broker;
            kvcached's take what is free on the device, so whatever else is free there is taken beforehand.
        total: bytes of all caches.
    """

    def __init__(
        self, contender: str, backend: str, opening: Opening, split: Sequence[int] | None, total: int
    ) -> None:
        self._contender = contender
        self._backend = backend
        self._opening = opening
        self._split = split
        self._total = total
        self._stack = ExitStack()
        self.facts: list[Any] = []

    def __enter__(self) -> Fleet:
        with ExitStack() as stack:
            broker = ""
            if self._contender == OURS:
                broker = stack.enter_context(_broker(self._backend, self._total)).path
            sizes = self._split or [self._total] * 3
            self._workers = [
                stack.enter_context(Worker("vllm.multi_worker", self._contender, self._backend))
                for _ in sizes
            ]
            self._threads = stack.enter_context(ThreadPoolExecutor(len(sizes)))
            openings = [msgspec.structs.replace(self._opening, kv_bytes=size) for size in sizes]
            with progress(f"starting the engines, {self._contender}", len(sizes)) as advance:
                self.facts = self._ask(
                    [
                        {"open": msgspec.to_builtins(each), "name": f"model-{number}", "broker": broker}
                        for number, each in enumerate(openings, start=1)
                    ],
                    STARTING,
                    advance,
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def warm_up(self, load: Load) -> None:
        """Has each engine serve a load, one after the other."""
        for worker in self._workers:
            worker.ask({"load": msgspec.to_builtins(load)})
        if self._contender == KVCACHED:
            # Now that what torch caches has come to rest.
            mapped = sum(worker.ask({"mapped": True}) for worker in self._workers)
            ballast = self._stack.enter_context(Worker("vllm.ballast", "ballast", self._backend))
            ballast.ask({"leave": max(0, self._total - mapped)})

    def serve(self, ramps: Sequence[Ramp], timeout: float) -> list[Any]:
        """Has each engine serve its ramp, all from one moment on.

        Raises:
            WorkerError: an engine failed; leaving the fleet waits until the others have ended their parts.
        """
        start = time.monotonic() + LEAD
        return self._ask([{"ramp": msgspec.to_builtins(ramp), "start": start} for ramp in ramps], timeout)

    def _ask(
        self,
        requests: Sequence[dict[str, Any]],
        timeout: float,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[Any]:
        answers = [
            self._threads.submit(worker.ask, request, timeout)
            for worker, request in zip(self._workers, requests, strict=True)
        ]
        for each in answers:
            each.add_done_callback(lambda _: advance(1))
        return [each.result() for each in answers]


def gpu_of(backend: str) -> str | None:
    """The UUID of a CUDA device; None on the host.

    Raises:
        WorkerError: there is no such device.
    """
    if device_of(backend)[0] == "host":
        return None
    # In a process of its own, for a CUDA context takes memory for as long as its process lives.
    code = f"import torch_elastic_mem as tem\nwith tem.Arena({backend!r}, broker=None) as a: print(a.uuid)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WorkerError(f"{backend}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def _broker(backend: str, total: int) -> BrokerProcess:
    """A broker that shares out so many bytes of the device, whatever else is free there."""
    device, free = gpu_of(backend) or "HOST", FREE[device_of(backend)[0]]
    return BrokerProcess(["--reserve", f"{device}={free},{free}", "--device", f"{device}={total + free}"])
