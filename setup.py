"""Builds the two extensions; the rest of the package's description is in pyproject.toml.

`torch_elastic_mem._C` is the core. It links neither torch nor CUDA.
`torch_elastic_mem._torch` is built only where torch can be imported, so only with `--no-build-isolation`. A
package without it works, except for the allocators that plug into torch from C++.

Environment: `TEM_SANITIZE=address` or `thread` instruments `_C`; `MAX_JOBS` bounds the compilers that run at
once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

CSRC = Path("csrc")
CORE = ("core", "backend", "ledger", "arena", "alloc", "kv", "capi", "bindings")
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


def torch_extension() -> list[Pybind11Extension]:
    """The extension that torch's own headers are needed for, or nothing where there is no torch."""
    sources = sorted(str(path) for path in (CSRC / "torch").rglob("*.cpp"))
    if not sources or os.environ.get("TEM_SANITIZE"):
        return []
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        print(f"note: building without torch_elastic_mem._torch, since torch cannot be imported ({error})")
        return []
    major, minor = torch.__version__.split(".")[:2]
    extension = Pybind11Extension(
        "torch_elastic_mem._torch",
        sources,
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
            *system_includes(*cpp_extension.include_paths(), pybind11.get_include()),
        ],
        # No rpath: the package imports torch first, so the libraries are in the process by then.
        library_dirs=cpp_extension.library_paths(),
        extra_link_args=["-Wl,--as-needed"],
        libraries=["c10", "torch_cpu", "torch_python"],
    )
    return [extension]


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


EXTENSIONS = [core_extension(), *torch_extension()]
ParallelCompile("MAX_JOBS", needs_recompile=stale).install()
setup(ext_modules=EXTENSIONS)
