"""One of torch's own allocators in bench_trim: gives its cache back beside queued work."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.contenders import Stage
from benchmarks.trim_load import CudaLoad
from benchmarks.worker import Handler, serve

BLOCK = 256 << 20


class TrimWorker:
    """Rounds of one contender."""

    def __init__(self, contender: str, backend: str) -> None:
        self._stage = Stage(contender, backend)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Fills the cache, queues work, and empties the cache."""
        device = self._stage.device
        blocks = [
            torch.empty(BLOCK, dtype=torch.uint8, device=device) for _ in range(request["cache"] // BLOCK)
        ]
        torch.cuda.synchronize()
        load = CudaLoad(device, request["queue_ms"])
        blocks.clear()
        before = torch.cuda.mem_get_info()[0]
        load.queue()
        start = time.perf_counter_ns()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        spent = time.perf_counter_ns() - start
        drained = load.drained()
        load.finish()
        return {"ns": spent, "drained": drained, "freed": free - before}


def make(contender: str, backend: str) -> Handler:
    """A worker for a contender."""
    return TrimWorker(contender, backend)


if __name__ == "__main__":
    serve(make)
