"""What NVIDIA's library says of a device, by a library of the test's own."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from torch_elastic_mem.broker.device_view import NoView, NvmlView, Reading, nvml_view


class NVMLError(Exception):
    pass


class Nvml(ModuleType):
    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.names: list[str] = []
        self.running: list[tuple[int, int | None]] | None = []
        self.driver = True

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("no driver")

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.names.append(name)
        if "unknown" in name:
            raise NVMLError("not found")
        return name

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> object:
        return SimpleNamespace(total=100, used=40)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[object]:
        if self.running is None:
            raise NVMLError("not permitted")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.running]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    library = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


def test_a_device_is_found_by_its_uuid_once(nvml: Nvml) -> None:
    view = nvml_view()
    assert isinstance(view, NvmlView)
    nvml.running = [(7, 30)]
    assert view.read("GPU-1") == view.read("GPU-1") == Reading(100, 40, {7: 30})
    assert view.read("abc") is not None
    assert nvml.names == ["GPU-1", "GPU-abc"]
    assert view.read("unknown") is None


def test_what_the_driver_does_not_say_is_left_out(nvml: Nvml) -> None:
    view = nvml_view()
    for unknown in ([(7, None)], None):
        nvml.running = unknown  # type: ignore[assignment]
        assert view.read("GPU-1") == Reading(100, 40, None)


def test_without_a_driver_or_the_library_nothing_is_seen(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.driver = False
    assert isinstance(nvml_view(), NoView)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert isinstance(nvml_view(), NoView)
    assert nvml_view().read("GPU-1") is None
