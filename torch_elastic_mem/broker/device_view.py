"""What a device itself shows of its memory, whoever holds it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Reading:
    """A device at one moment, in bytes.

    Attributes:
        processes: bytes by pid; None where the driver does not say.
    """

    total: int
    used: int
    processes: dict[int, int] | None = None


class DeviceView(Protocol):
    """Something that can look at devices."""

    def read(self, uuid: str) -> Reading | None:
        """The device of that UUID; None where it cannot be seen."""


class NoView:
    """Where nothing can be seen, what tenants say is all there is."""

    def read(self, uuid: str) -> Reading | None:
        """Nothing."""
        return None


class NvmlView:
    """NVIDIA's devices, by nvidia-ml-py: no CUDA context."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._handles: dict[str, Any] = {}

    def read(self, uuid: str) -> Reading | None:
        """The device's memory, and who has it. A call takes some hundred microseconds."""
        nvml = self._nvml
        try:
            handle = self._handles.get(uuid)
            if handle is None:
                name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
                handle = self._handles[uuid] = nvml.nvmlDeviceGetHandleByUUID(name)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError:
            return None
        try:
            running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except nvml.NVMLError:
            return Reading(memory.total, memory.used)
        # In a container the driver may know a process by no number of ours, or not say how much it has.
        known = {each.pid: each.usedGpuMemory for each in running}
        whole = all(bytes is not None for bytes in known.values())
        return Reading(memory.total, memory.used, known if whole else None)


def nvml_view() -> DeviceView:
    """NVIDIA's, where nvidia-ml-py and a driver are; otherwise none."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return NoView()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return NoView()
    return NvmlView(nvml)
