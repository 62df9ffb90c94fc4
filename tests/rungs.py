"""What a test needs of the rung it runs on: arenas, memory to look at, streams to drive by hand."""

from __future__ import annotations

import ctypes
import gc
import sys
import traceback
import weakref
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pytest

import torch_elastic_mem as tem
from torch_elastic_mem import _C
from torch_elastic_mem.account import Reclaimer

MiB = 1 << 20


class Stream(Protocol):
    """A stream whose work is pending between `submit()` and `complete()`. `handle` is what the core takes."""

    handle: int

    def submit(self) -> None: ...
    def complete(self) -> None: ...
    def close(self) -> None: ...


def forget_locals(failed: BaseException | None) -> None:
    if failed is None:
        return
    traceback.clear_frames(failed.__traceback__)
    for frame, _ in traceback.walk_tb(failed.__traceback__):
        frame.f_locals  # noqa: B018  (before Python 3.13 a copy, which only a look brings up to date)


def is_open(arena: tem.Arena) -> bool:
    try:
        return arena.capacity > 0
    except tem.ClosedError:
        return False


class Rung(ABC):
    """Common to all. Arenas and streams it made are closed with it."""

    name = ""
    device = ""

    def __init__(self) -> None:
        self._arenas: list[tem.Arena] = []
        self._streams: list[Stream] = []
        self._reclaimers: list[Reclaimer] = []

    def arena(
        self,
        capacity: int | str = 64 * MiB,
        *,
        reserve: tuple[int | str, int | str] = (0, 0),
        yield_timeout: float = 1.0,
        device: str | None = None,
        broker: str | None = None,
    ) -> tem.Arena:
        """An open arena; the test need not close it."""
        made = tem.Arena(
            device or self.device,
            capacity=capacity,
            reserve=None if broker else reserve,
            yield_timeout=yield_timeout,
            broker=broker,
        )
        self._arenas.append(made)
        return made

    def watch_reclaimers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Removes at the end what tests register: a callback that owns its account keeps the arena open."""
        register = tem.Account.on_reclaim

        def registered(account: tem.Account, *args: Any, **kwargs: Any) -> Reclaimer:
            self._reclaimers.append(register(account, *args, **kwargs))
            return self._reclaimers[-1]

        monkeypatch.setattr(tem.Account, "on_reclaim", registered)

    def leftovers(self) -> bool:
        """Whether the device shows that something is alive."""
        return False

    def stream(self) -> Stream:
        made = self._new_stream()
        self._streams.append(made)
        return made

    @abstractmethod
    def _new_stream(self) -> Stream: ...

    def read(self, address: int, count: int) -> bytes:
        """Bytes of device memory."""
        return ctypes.string_at(address, count)

    def write(self, address: int, data: bytes) -> None:
        """Into device memory."""
        ctypes.memmove(address, data, len(data))

    def close(self) -> None:
        for stream in self._streams:
            stream.complete()
        for reclaimer in self._reclaimers:
            with suppress(tem.TemError):  # closed by the test
                reclaimer.remove()
        self._reclaimers.clear()
        alive = [weakref.ref(arena) for arena in self._arenas if is_open(arena)]
        self._arenas.clear()
        # An exception that a test caught, or failed with, holds its frame, and so an arena, of which a
        # device has but one.
        if any(arena() is not None for arena in alive) or self.leftovers():
            forget_locals(getattr(sys, "last_value", None))
            gc.collect()
        for stream in self._streams:
            stream.close()


class HostStream:
    def __init__(self) -> None:
        self.handle = _C.host_stream_create()

    def submit(self) -> None:
        _C.host_stream_submit(self.handle)

    def complete(self) -> None:
        _C.host_stream_complete(self.handle)

    def close(self) -> None:
        _C.host_stream_destroy(self.handle)


class HostRung(Rung):
    name = "host"
    device = "host"

    def _new_stream(self) -> Stream:
        return HostStream()


class FakeStream:
    def __init__(self, driver: ctypes.CDLL) -> None:
        self._driver = driver
        out = ctypes.c_void_p()
        assert driver.cuStreamCreate(ctypes.byref(out), 1) == 0
        self.handle = out.value or 0

    def submit(self) -> None:
        assert self._driver.fake_cuda_stream_submit(ctypes.c_void_p(self.handle)) == 0

    def complete(self) -> None:
        assert self._driver.fake_cuda_stream_complete(ctypes.c_void_p(self.handle)) == 0

    def close(self) -> None:
        assert self._driver.cuStreamDestroy_v2(ctypes.c_void_p(self.handle)) == 0


class FakeRung(Rung):
    """The real CUDA backend over tests/fake_cuda, whose device memory is host memory."""

    name = "fake"
    device = "cuda"

    def __init__(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr("torch_elastic_mem.arena.LIBCUDA", str(library))
        monkeypatch.setattr("torch_elastic_mem.elastic_kv.bytes_tensor", _bytes_tensor_on_cpu)
        self.driver = ctypes.CDLL(str(library))
        self.driver.fake_cuda_count.restype = ctypes.c_size_t
        self.driver.fake_cuda_calls.restype = ctypes.c_size_t
        self._context = ctypes.c_void_p()
        assert self.driver.cuInit(0) == 0
        assert self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), 0) == 0
        assert self.driver.cuCtxSetCurrent(self._context) == 0
        self.before = self.live()

    def _new_stream(self) -> Stream:
        return FakeStream(self.driver)

    def live(self) -> tuple[int, int, int]:
        """Handles, mappings and reservations that exist in the driver."""
        counts = [ctypes.c_size_t() for _ in range(4)]
        self.driver.fake_cuda_live(*(ctypes.byref(count) for count in counts))
        return (counts[0].value, counts[1].value, counts[2].value)

    def leftovers(self) -> bool:
        try:
            tem.Arena(self.device, capacity=2 * MiB, reserve=(0, 0), broker=None).close()
        except tem.InUseError:
            return True
        return self.live() != self.before

    def fail_nth(self, n: int, code: int = 999) -> None:
        """The n-th driver call of memory management, memset or event from now answers `code`; 0 disarms."""
        self.driver.fake_cuda_fail_nth(ctypes.c_size_t(n), code)

    def calls(self) -> int:
        """Counted calls since `fail_nth`."""
        return int(self.driver.fake_cuda_calls())

    def close(self) -> None:
        self.fail_nth(0)
        super().close()


class _DLTensorHead(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


def _bytes_tensor_on_cpu(capsule: Any) -> Any:
    """The fake's device memory is this process's: a CPU build of torch may look at it as such."""
    import torch

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    head = _DLTensorHead.from_address(pointer(capsule, b"dltensor"))
    head.device_type, head.device_id = 1, 0
    return torch.utils.dlpack.from_dlpack(capsule)


class CudaStream:
    """A real stream that waits on a word of pinned memory until the test writes it."""

    def __init__(self) -> None:
        import torch
        from cuda.bindings import driver

        self._driver = driver
        self._stream = torch.cuda.Stream()
        self.handle = self._stream.cuda_stream
        self._flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._round = 0

    def submit(self) -> None:
        self._round += 1
        (error,) = self._driver.cuStreamWaitValue32(
            self.handle,
            self._flag.data_ptr(),
            self._round,
            self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ,
        )
        assert error == self._driver.CUresult.CUDA_SUCCESS, error

    def complete(self) -> None:
        self._flag.fill_(self._round)
        self._stream.synchronize()

    def close(self) -> None:
        self.complete()


class CudaRung(Rung):
    name = "cuda"
    device = "cuda"

    def _new_stream(self) -> Stream:
        return CudaStream()

    def _driver(self) -> Any:
        """The driver, with the device's context on this thread."""
        import torch
        from cuda.bindings import driver

        torch.cuda.init()
        torch.cuda.current_stream().query()  # makes the context current; waits for nothing
        return driver

    def read(self, address: int, count: int) -> bytes:
        driver = self._driver()
        out = bytearray(count)
        buffer = (ctypes.c_char * count).from_buffer(out)
        (error,) = driver.cuMemcpyDtoH(ctypes.addressof(buffer), address, count)
        assert error == driver.CUresult.CUDA_SUCCESS, error
        return bytes(out)

    def write(self, address: int, data: bytes) -> None:
        driver = self._driver()
        buffer = ctypes.create_string_buffer(data, len(data))
        (error,) = driver.cuMemcpyHtoD(address, ctypes.addressof(buffer), len(data))
        assert error == driver.CUresult.CUDA_SUCCESS, error
        # A copy from pageable memory may return before it is done.
        (error,) = driver.cuStreamSynchronize(0)
        assert error == driver.CUresult.CUDA_SUCCESS, error
