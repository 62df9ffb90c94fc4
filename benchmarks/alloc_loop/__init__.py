"""Loops of allocate and free in C++: through torch's current CUDA allocator, or through malloc.

The library for torch is built against torch's headers and those of CUDA, by the compiler alone.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compiler import BuildError, shared_library

_SOURCES = Path(__file__).parent
_CUDA_HEADER = "cuda_runtime_api.h"


class LoopError(RuntimeError):
    """An allocator refused; says what it said."""


class Loop:
    """The loops over one allocator. A call runs without the GIL."""

    def __init__(self, library: Path, device: int = 0, stream: int = 0) -> None:
        self._library = _opened(library)
        self._device = device
        self._stream = stream

    def pairs(self, nbytes: int, pairs: int, threads: int) -> float:
        """Nanoseconds that a pair takes each of `threads` threads."""
        return self._checked(self._library.loop_pairs(self._device, self._stream, nbytes, pairs, threads))

    def mixed(self, sizes: Sequence[int], slots: Sequence[int]) -> float:
        """Nanoseconds that a step takes: step i frees what is in slots[i] and puts sizes[i] bytes there."""
        count = len(sizes)
        return self._checked(
            self._library.loop_mixed(
                self._device,
                self._stream,
                (ctypes.c_size_t * count)(*sizes),
                (ctypes.c_uint32 * count)(*slots),
                count,
                max(slots) + 1,
            )
        )

    def _checked(self, nanoseconds: float) -> float:
        if nanoseconds < 0:
            message: bytes = self._library.loop_error()
            raise LoopError(message.decode())
        return nanoseconds


@functools.cache
def _opened(library: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(library))
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    opened.loop_pairs.argtypes = [ctypes.c_int, pointer, size, size, size]
    opened.loop_mixed.argtypes = [
        ctypes.c_int,
        pointer,
        ctypes.POINTER(size),
        ctypes.POINTER(ctypes.c_uint32),
        size,
        size,
    ]
    opened.loop_pairs.restype = opened.loop_mixed.restype = ctypes.c_double
    opened.loop_error.argtypes = []
    opened.loop_error.restype = ctypes.c_char_p
    return opened


def malloc_library() -> Path:
    """The loops over malloc."""
    return shared_library(
        "malloc_loop", [_SOURCES / "malloc_loop.cpp"], ["-std=c++17"], headers=[_SOURCES / "loop.hpp"]
    )


def torch_library() -> Path:
    """The loops over torch's current CUDA allocator.

    Raises:
        BuildError: CUDA's headers are not to be found, or the compiler failed.
    """
    import torch
    from torch.utils import cpp_extension

    folders = [*cpp_extension.include_paths(), _cuda_include()]
    return shared_library(
        "torch_loop",
        [_SOURCES / "torch_loop.cpp"],
        [
            "-std=c++20",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *[flag for folder in folders for flag in ("-isystem", folder)],
        ],
        # No rpath: torch is imported, so the libraries are in the process.
        [*[f"-L{folder}" for folder in cpp_extension.library_paths()], "-lc10", "-lc10_cuda"],
        headers=[_SOURCES / "loop.hpp", Path(torch.__file__).with_name("version.py")],
    )


def _cuda_include() -> str:
    from torch.utils import cpp_extension

    homes = [Path(home) / "include" for home in (cpp_extension.CUDA_HOME, "/usr/local/cuda") if home]
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or []) if wheels else []:
        homes += sorted(Path(folder).glob("*/include"))
    for home in homes:
        if (home / _CUDA_HEADER).exists():
            return str(home)
    raise BuildError(
        f"no {_CUDA_HEADER}: set CUDA_HOME, or install the wheel nvidia-cuda-runtime; "
        f"looked in {', '.join(map(str, homes))}"
    )
