"""Work queued on a device behind which memory must not have to wait."""

from __future__ import annotations

from typing import Protocol

import torch

from torch_elastic_mem import _C

KERNELS = 20
_PROBE_CYCLES = 20_000_000


class Load(Protocol):
    """Queues work that keeps the device busy for a while."""

    stream: int

    def queue(self) -> None:
        """Queues it and returns at once."""

    def drained(self) -> bool:
        """Whether all that was queued is done."""

    def finish(self) -> None:
        """Waits until it is."""


class CudaLoad:
    """Kernels that only spin, on torch's current stream."""

    def __init__(self, device: torch.device, milliseconds: float) -> None:
        torch.cuda.set_device(device)
        self.stream = torch.cuda.current_stream().cuda_stream
        # The first one raises the clocks, so that the second tells how long the later ones take.
        torch.cuda._sleep(_PROBE_CYCLES)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.cuda._sleep(_PROBE_CYCLES)
        end.record()
        end.synchronize()
        self._cycles = int(_PROBE_CYCLES / begin.elapsed_time(end) * milliseconds / KERNELS)
        self._end = end

    def queue(self) -> None:
        """Queues the kernels."""
        for _ in range(KERNELS):
            torch.cuda._sleep(self._cycles)
        self._end.record()

    def drained(self) -> bool:
        """Whether the last kernel is done."""
        return bool(self._end.query())

    def finish(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize()


class HostLoad:
    """A stream driven by hand: its work is done when finish() says so."""

    def __init__(self) -> None:
        self.stream = _C.host_stream_create()
        self._done = True

    def queue(self) -> None:
        """Queues work."""
        for _ in range(KERNELS):
            _C.host_stream_submit(self.stream)
        self._done = False

    def drained(self) -> bool:
        """Whether finish() has been called since."""
        return self._done

    def finish(self) -> None:
        """Completes all."""
        if not self._done:
            _C.host_stream_complete(self.stream, KERNELS)
        self._done = True


def load_on(backend: str, device: str, milliseconds: float) -> Load:
    """The load of a backend, on its device."""
    return HostLoad() if backend == "host" else CudaLoad(torch.device(device), milliseconds)
