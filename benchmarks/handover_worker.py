"""One of two processes that hand memory to each other: `python -m benchmarks.handover_worker ROLE BACKEND`.

The hog is of a lower class and holds everything, the taker of a higher one and wants some of it.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import Any

import torch

import torch_elastic_mem as tem
from benchmarks.floor import Floor
from benchmarks.timing import elapsed_ns
from benchmarks.worker import Handler, serve

EXTENT = 64 << 20
FIXED_PAGE = 2 << 20
CLASSES = {"hog": "training", "taker": "serving"}


class Tenant:
    """Answers the requests of one role: each has a `do`, and what that needs."""

    def __init__(self, role: str, backend: str) -> None:
        self._role = role
        self._backend = backend
        self._arena = tem.Arena(backend)
        self._account = self._arena.account(role, CLASSES[role])
        self._range = self._account.range(256 << 30, keep=256 << 30, extent=EXTENT)
        self._floors: dict[int, Floor] = {}
        self._training: threading.Thread | None = None
        self._over = threading.Event()
        self._steps = 0

    def __call__(self, request: dict[str, Any]) -> Any:
        return getattr(self, request.pop("do"))(**request)

    # The arena.

    def fill(self) -> int:
        """Takes all that is free, and lets it lie idle; returns what is held."""
        step = 16 * EXTENT
        while step >= EXTENT:
            try:
                self._range.grow(step, timeout=0.05)
            except tem.OutOfMemory:
                step //= 2
        self._drop()
        return self._account.held

    def take(self, size: int) -> int:
        """Grows by `size` bytes; nanoseconds."""
        return elapsed_ns(lambda: self._range.grow(size, timeout=10.0))

    def give(self) -> int:
        """Gives everything back to the broker; returns what is held still."""
        self._drop()
        self._account.trim()
        return self._account.held

    def _drop(self) -> None:
        if self._range.mapped:
            self._range.shrink(self._range.mapped)

    # The bare driver.

    def floor_take(self, size: int, extent: int) -> int:
        if extent not in self._floors:
            self._floors[extent] = Floor(self._arena.device, size, extent)
        return self._floors[extent].take()

    def floor_give(self, extent: int) -> int:
        return self._floors[extent].give()

    # What keeps a victim busy.

    def hold_gil(self, seconds: float) -> None:
        """From a moment after the answer on, no Python runs in this process for so long."""

        def hold() -> None:
            time.sleep(0.05)
            ctypes.PyDLL(None).usleep(int(seconds * 1e6))

        threading.Thread(target=hold).start()

    def train(self) -> None:
        """Trains until `trained`, from a cache that has much more than it needs."""
        self._over.clear()
        self._training = threading.Thread(target=self._train)
        self._training.start()

    def trained(self) -> int:
        """Ends it; returns the steps."""
        assert self._training is not None
        self._over.set()
        self._training.join()
        return self._steps

    def _train(self) -> None:
        device = torch.device(self._arena.device)
        if device.type == "cuda":
            # The first use of torch's CUDA here.
            torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", account=self._account))
            self._run(device, width=4096)
            return
        with self._account.allocations():
            self._run(device, width=512)

    def _run(self, device: torch.device, width: int) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(width, width) for _ in range(8)]
        model = torch.nn.Sequential(*layers).to(device)
        optimizer = torch.optim.AdamW(model.parameters())
        count = self._account.held // EXTENT // 2 if device.type == "cpu" else 64
        ballast = [torch.empty(EXTENT, dtype=torch.uint8, device=device) for _ in range(count)]
        ballast.clear()  # and so a cache
        while not self._over.is_set():
            loss = model(torch.randn(width // 4, width, device=device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self._steps += 1


class Probe:
    """Says what the device has, outside of any broker."""

    def __init__(self, backend: str) -> None:
        with tem.Arena(backend, capacity="1GiB", broker=None) as arena:
            self.uuid = arena.uuid
        self.free = 0
        if backend != "host":
            self.free = torch.cuda.mem_get_info(arena.device)[0]

    def __call__(self, request: dict[str, Any]) -> Any:
        return {"uuid": self.uuid, "free": self.free}


def make(role: str, backend: str) -> Handler:
    os.environ.setdefault("TEM_NAME", role)
    return Probe(backend) if role == "probe" else Tenant(role, backend)


if __name__ == "__main__":
    serve(make)
