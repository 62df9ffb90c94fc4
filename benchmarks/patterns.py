"""What is written to a tenant's memory and looked for in it: one byte over and over, by the CPU or a GPU."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch_elastic_mem as tem

_LIBC = ctypes.CDLL(None)
for _function in (_LIBC.memcmp, _LIBC.memset):
    _function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_LIBC.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


class Pattern(Protocol):
    """Memory of a device, by address."""

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Writes a byte all over."""

    def found(self, address: int, nbytes: int) -> int | None:
        """The byte that is all over; None if there are several."""


class HostPattern:
    """Memory of this process."""

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Writes a byte all over."""
        _LIBC.memset(address, byte, nbytes)

    def found(self, address: int, nbytes: int) -> int | None:
        """The byte that is all over; None if there are several."""
        # Equal to itself, moved by one.
        if _LIBC.memcmp(address, address + 1, nbytes - 1) != 0:
            return None
        return ctypes.c_ubyte.from_address(address).value


class CudaPattern:
    """Memory of a GPU, on the legacy stream. Needs no torch. Any thread may call it.

    Raises:
        tem.DriverError: a call failed; says which and with what code.
    """

    def __init__(self, ordinal: int) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._context = ctypes.c_void_p()
        device = ctypes.c_int()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._host = HostPattern()

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Queues the writing of a byte all over."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(byte), ctypes.c_size_t(nbytes))

    def found(self, address: int, nbytes: int) -> int | None:
        """The byte that is all over; None if there are several."""
        copy = ctypes.create_string_buffer(nbytes)
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemcpyDtoH_v2", copy, ctypes.c_uint64(address), ctypes.c_size_t(nbytes))
        return self._host.found(ctypes.addressof(copy), nbytes)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code != 0:
            raise tem.DriverError(f"{name} failed with CUresult {code}")


def pattern_on(arena: tem.Arena) -> Pattern:
    """For the memory of an arena."""
    if arena.backend == "host":
        return HostPattern()
    return CudaPattern(int(arena.device.partition(":")[2]))
