"""The floor: what the bare driver takes for the same work, timed inside C++.

The library beside this file is built with $CXX when it is first asked for. It needs no CUDA toolkit:
libcuda.so.1 is opened at run time.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from types import TracebackType

from benchmarks.compiler import BuildError, shared_library

_SOURCES = Path(__file__).parent
_CSRC = _SOURCES.parents[1] / "csrc"
_HOST = -1


class FloorError(RuntimeError):
    """The library could not be built, or the bare driver refused a call; says which and with what code."""


class Floor:
    """Bare driver calls on one device, over `size` bytes in extents of `extent` bytes. Not thread-safe.

    Holds nothing but addresses until take() or hold(). Every timed call returns nanoseconds.

    Args:
        device: "host" or a torch device string of CUDA ("cuda", "cuda:1").
        size: bytes, a multiple of `extent`.
        extent: bytes of each physical allocation.

    Raises:
        FloorError: no compiler, no driver, or a driver call that failed.
    """

    def __init__(self, device: str, size: int, extent: int) -> None:
        self._library = _library()
        ordinal = _HOST if device in ("host", "cpu") else int(device.partition(":")[2] or 0)
        self._floor = self._library.floor_open(ordinal, size, extent)
        if not self._floor:
            raise self._error()

    def take(self) -> int:
        """Creates, maps and makes accessible."""
        return self._timed("floor_take")

    def give(self) -> int:
        """Unmaps and releases."""
        return self._timed("floor_give")

    def hold(self) -> None:
        """Creates the extents and leaves them unmapped: a warm pool."""
        self._timed("floor_hold")

    def take_pooled(self) -> int:
        """Maps the held extents and makes them accessible."""
        return self._timed("floor_take_pooled")

    def give_pooled(self) -> int:
        """Unmaps, and holds on to the extents."""
        return self._timed("floor_give_pooled")

    def handover(self) -> int:
        """Unmaps every extent from one reservation, then maps it in another: a yield, bare."""
        return self._timed("floor_handover")

    def close(self) -> None:
        """Gives everything back."""
        if self._floor:
            self._library.floor_close(self._floor)
            self._floor = None

    def __enter__(self) -> Floor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _timed(self, name: str) -> int:
        nanoseconds: int = getattr(self._library, name)(self._floor)
        if nanoseconds < 0:
            raise self._error()
        return nanoseconds

    def _error(self) -> FloorError:
        message: bytes = self._library.floor_error()
        return FloorError(message.decode())


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_built()))
    library.floor_open.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t]
    library.floor_open.restype = ctypes.c_void_p
    library.floor_close.argtypes = [ctypes.c_void_p]
    library.floor_close.restype = None
    library.floor_error.argtypes = []
    library.floor_error.restype = ctypes.c_char_p
    for name in ("take", "give", "hold", "take_pooled", "give_pooled", "handover"):
        function = getattr(library, f"floor_{name}")
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_int64
    return library


def _built() -> Path:
    try:
        return shared_library(
            "floor",
            [_SOURCES / "floor.cpp"],
            ["-std=c++17", f"-I{_CSRC}"],
            ["-ldl"],
            headers=[*sorted(_SOURCES.glob("*.hpp")), _CSRC / "backend" / "cuda_abi.hpp"],
        )
    except BuildError as error:
        raise FloorError(str(error)) from error
