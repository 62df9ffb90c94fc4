"""Takes what is free on a device but for so much, for contenders that share whatever is free there."""

from __future__ import annotations

from typing import Any

import torch

import torch_elastic_mem as tem
from benchmarks.worker import Handler, serve

# The part of a device that kvcached leaves alone, KVCACHED_GPU_UTILIZATION being 0.95.
LEFT_ALONE = 0.05


def weight(free: int, total: int, leave: int, granularity: int) -> int:
    """Bytes to take so that kvcached finds `leave` bytes, in multiples of the granularity."""
    return max(0, free - round(total * LEFT_ALONE) - leave) // granularity * granularity


class Ballast:
    """Memory that nobody is to have, for as long as this process lives."""

    def __init__(self, backend: str) -> None:
        self._arena = tem.Arena(backend, reserve=(0, 0), broker=None)
        self._range = self._arena.account("ballast", "serving").range(self._arena.capacity)

    def __call__(self, request: dict[str, Any]) -> int:
        """Answers {"leave": bytes} with what it took."""
        free, total = torch.cuda.mem_get_info()
        taken = weight(free, total, request["leave"], self._arena.granularity)
        self._range.grow(taken)
        return taken


def make(contender: str, backend: str) -> Handler:
    """A worker; there is one kind."""
    return Ballast(backend)


if __name__ == "__main__":
    serve(make)
