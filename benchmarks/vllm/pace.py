"""How fast a device comes from one kernel to the next that waits for it, in a graph of a process's own."""

from __future__ import annotations

from typing import Any

from benchmarks.timing import percentile

# Small ones, so that what is between them is most of what they take.
KERNELS = 1000
REPLAYS = 20


class Pace:
    """Seconds a kernel, each time it is asked; None on the host. The graph is captured once."""

    def __init__(self, device: Any) -> None:
        self._graph: Any = None
        if device.type == "cuda":
            self._capture(device)

    def _capture(self, device: Any) -> None:
        import torch

        number = torch.zeros(1, device=device)
        number.add_(1)  # what is compiled or loaded first is not captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Threads of the engine's may use the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(KERNELS):
                number.add_(1)
        self._graph, self._number = graph, number

    def __call__(self) -> float | None:
        if self._graph is None:
            return None
        import torch

        taken = []
        for _ in range(REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3 / KERNELS)
        return percentile(taken, 50)
