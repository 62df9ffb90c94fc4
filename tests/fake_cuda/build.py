"""Builds the fake CUDA driver, `libcuda.so.1`, with nothing but a C++ compiler.

From a shell: `python tests/fake_cuda/build.py OUT` prints the path of the library.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_CSRC = _HERE.parents[1] / "csrc"
_SHARED = ["backend/address_table.cpp", "backend/memfd_space.cpp", "core/fork.cpp", "core/sizes.cpp"]
_FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"]


def build(out_dir: Path, sanitize: str | None = None) -> Path:
    """Compiles the fake into `out_dir` unless a library newer than every source is there.

    Args:
        out_dir: created if need be; one per value of `sanitize`.
        sanitize: what `-fsanitize=` is given. The program that loads the library must have the same.

    Returns:
        The path of `libcuda.so.1`, for `dlopen` or `LD_LIBRARY_PATH`.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its words are on stderr.
    """
    sources = [*sorted(_HERE.glob("*.cpp")), *(_CSRC / name for name in _SHARED)]
    read = [*sources, *_HERE.glob("*.hpp"), *_CSRC.glob("backend/*.hpp"), *_CSRC.glob("core/*.hpp")]
    out = Path(out_dir) / "libcuda.so.1"
    if out.exists() and out.stat().st_mtime > max(path.stat().st_mtime for path in read):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    # Built beside and renamed, so that two test processes never load half a library.
    unfinished = out.with_name(f"{out.name}.{os.getpid()}")
    command = [
        *shlex.split(os.environ.get("CXX", "c++")),
        *_FLAGS,
        *([f"-fsanitize={sanitize}"] if sanitize else []),
        "-fPIC",
        "-fvisibility=hidden",
        "-shared",
        "-Wl,-soname,libcuda.so.1",
        f"-I{_CSRC}",
        *map(str, sources),
        "-ldl",
        "-pthread",
        "-o",
        str(unfinished),
    ]
    subprocess.run(command, check=True)
    unfinished.rename(out)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: build.py OUT")
    print(build(Path(sys.argv[1])))
