"""Builds the extensions; the rest of the package's description is in pyproject.toml.

`torch_elastic_mem._C` is the core. It links neither torch nor CUDA.
`torch_elastic_mem._torch` is built only where torch can be imported, so only with `--no-build-isolation`.
`torch_elastic_mem._torch_cuda` is built only where that torch is a CUDA build and the headers of CUDA's
runtime are there: in CUDA_HOME, or in the wheels that torch's CUDA comes from.
A package without the two works, except for the allocators that plug into torch from C++.

Environment: `TEM_SANITIZE=address` or `thread` instruments `_C`; `MAX_JOBS` bounds the compilers that run at
once.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

CSRC = Path("csrc")
CORE = ("core", "backend", "ledger", "arena", "alloc", "kv", "ipc", "client", "broker", "capi", "bindings")
HEADERS = sorted(str(path) for pattern in ("*.hpp", "*.h") for path in CSRC.rglob(pattern))
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


def core_extension() -> Pybind11Extension:
    """The core: every folder of csrc/ but torch/."""
    sanitize = os.environ.get("TEM_SANITIZE", "")
    if sanitize not in SANITIZERS:
        sys.exit(f"TEM_SANITIZE is {sanitize!r}; it may be 'address', 'thread' or unset")
    flags = SANITIZERS[sanitize]
    # Python is built with -fwrapv and passes it on; with it, overflow is nothing to report.
    debug = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv"] if flags else ["-O2"]
    return Pybind11Extension(
        "torch_elastic_mem._C",
        sorted(str(path) for folder in CORE for path in (CSRC / folder).rglob("*.cpp")),
        include_dirs=[str(CSRC)],
        depends=HEADERS,
        cxx_std=17,
        extra_compile_args=[*debug, *WARNINGS, *system_includes(pybind11.get_include()), *flags],
        extra_link_args=["-pthread", *flags],
        libraries=["dl"],
    )


def torch_extensions() -> list[Pybind11Extension]:
    """The extensions that torch's own headers are needed for: as many as can be built here."""
    if os.environ.get("TEM_SANITIZE"):
        return []
    try:
        import torch
    except ImportError as error:
        print(f"note: building without torch_elastic_mem._torch, since torch cannot be imported ({error})")
        return []
    extensions = [torch_extension("_torch", "cpu_*.cpp", libraries=["c10", "torch_cpu", "torch_python"])]
    if torch.version.cuda is None:
        print("note: building without torch_elastic_mem._torch_cuda, since this torch is no CUDA build")
    elif (headers := cuda_headers()) is None:
        print(
            "note: building without torch_elastic_mem._torch_cuda, since the headers of CUDA's runtime are "
            "not found; set CUDA_HOME, or install nvidia-cuda-runtime and nvidia-cuda-crt of torch's CUDA "
            f"({torch.version.cuda})"
        )
    else:
        # The runtime's functions come with c10_cuda, which has loaded the library that torch runs on.
        libraries = ["c10", "c10_cuda", "torch_cpu", "torch_python"]
        extensions.append(torch_extension("_torch_cuda", "cuda_*.cpp", libraries=libraries, headers=headers))
    return extensions


def torch_extension(
    name: str, sources: str, *, libraries: list[str], headers: str | None = None
) -> Pybind11Extension:
    """An extension of the files of csrc/torch/ that `sources` matches."""
    import torch
    from torch.utils import cpp_extension

    major, minor = torch.__version__.split(".")[:2]
    return Pybind11Extension(
        f"torch_elastic_mem.{name}",
        sorted(str(path) for path in (CSRC / "torch").glob(sources)),
        include_dirs=[str(CSRC)],
        # A torch of another version in the same place makes every object stale.
        depends=[*HEADERS, str(Path(torch.__file__).with_name("version.py"))],
        define_macros=[
            ("TEM_TORCH_VERSION", f'"{major}.{minor}"'),
            ("_GLIBCXX_USE_CXX11_ABI", str(int(torch.compiled_with_cxx11_abi()))),
        ],
        cxx_std=20,  # what torch's headers are written in since 2.13
        extra_compile_args=[
            "-O2",
            *WARNINGS,
            # torch carries its own pybind11; its casters are only good with that one.
            *system_includes(
                *cpp_extension.include_paths(), pybind11.get_include(), *filter(None, [headers])
            ),
        ],
        # No rpath: the package imports torch first, so the libraries are in the process by then.
        library_dirs=cpp_extension.library_paths(),
        extra_link_args=["-Wl,--as-needed"],
        libraries=libraries,
    )


def cuda_headers() -> str | None:
    """The folder of CUDA's runtime headers, or None. In wheels, some come in a package of their own."""
    from torch.utils.cpp_extension import CUDA_HOME

    found = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in (found and found.submodule_search_locations) or ()]
    folders = [Path(CUDA_HOME) / "include"] if CUDA_HOME else []
    folders += [
        path for wheel in wheels for name in ("cu*", "cuda_runtime") for path in wheel.glob(f"{name}/include")
    ]
    needed = ("cuda_runtime_api.h", "crt/host_defines.h")
    return next((str(each) for each in folders if all((each / name).is_file() for name in needed)), None)


def system_includes(*folders: str) -> list[str]:
    """Include flags for headers whose warnings are not ours to fix."""
    return [flag for folder in folders for flag in ("-isystem", folder)]


def stale(obj: str, src: str) -> bool:
    """Whether `src` must be compiled again: distutils looks at no header."""
    if not os.path.exists(obj):
        return True
    built = os.path.getmtime(obj)
    inputs = next(e.depends for e in EXTENSIONS if src in e.sources)
    return any(os.path.getmtime(path) > built for path in [src, *inputs])


EXTENSIONS = [core_extension(), *torch_extensions()]
ParallelCompile("MAX_JOBS", needs_recompile=stale).install()
setup(ext_modules=EXTENSIONS)
