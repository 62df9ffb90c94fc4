"""Steps that build the package from its source archive and install it where nothing else is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checks.shell import BUILD, PYTHON, ROOT, Skipped, run

SUPPORTED = ("3.11", "3.12", "3.13")
# Of them, where there is one: two steps need not build for the same.
OF_WHEEL_CUDA = "3.12"
ARCHIVE = "from setuptools.build_meta import build_sdist; print(build_sdist({folder!r}))"
BUILD_TOOLS = ("pybind11>=2.13", "setuptools>=77", "wheel")

IMPORTS = """
import importlib.util
import torch_elastic_mem._C
assert importlib.util.find_spec("torch_elastic_mem.integrations"), "the linked package is not in the archive"
assert importlib.util.find_spec("torch_elastic_mem._torch") is None, "built without torch, yet it is there"
"""

ALLOCATES = """
import torch
import torch_elastic_mem as tem
import torch_elastic_mem._torch
assert torch.version.cuda, "this torch is no CUDA build"
with tem.Arena("host", capacity="256MiB") as arena, arena.account("tenant") as account:
    with account.allocations():
        held = torch.ones(1 << 20)
    assert account.held >= held.nbytes, (account.held, held.nbytes)
    assert float(held.sum()) == held.numel()
    del held
from torch_elastic_mem import _C, _torch_cuda
made = _torch_cuda.make_allocator(_C.malloc_directory())
torch.cuda.memory.change_current_allocator(torch.cuda.memory._CUDAAllocator(made))
assert torch.cuda.memory.get_allocator_backend() == "torch_elastic_mem"
print(torch.__version__)
"""
TWO_LINES = """
import torch, torch_elastic_mem as tem
torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", priority="training"))
assert torch.cuda.memory.get_allocator_backend() == "torch_elastic_mem"
"""
INCLUDES = """
import nvidia, pybind11, sysconfig
from pathlib import Path
print(pybind11.get_include(), sysconfig.get_path("include"), sep="\\n")
found = (file for place in nvidia.__path__ for file in Path(place).glob("*/include/crt/host_defines.h"))
print(*{file.parents[1] for file in found})
"""


def pythons() -> str:
    """The source archive builds and imports under other supported interpreters, without torch."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    others = [version for version in SUPPORTED if version not in (running, OF_WHEEL_CUDA)]
    found = {version: base for version in others if (base := interpreter(version))}
    if not found:
        raise Skipped(f"no python {' or '.join(others)} on this machine")
    archive = source_archive()
    for version, base in found.items():
        python = environment(f"python-{version}", base)
        pip_install(python, *BUILD_TOOLS)
        pip_install(python, "--no-build-isolation", "--no-deps", archive)
        run(python, "-P", "-c", IMPORTS)
    return f"the source archive builds on {' and '.join(found)}"


def wheel_cuda() -> str:
    """Both extensions compile against a CUDA torch without nvcc, and are taken by it without a GPU."""
    python = environment("wheel-cuda", interpreter(OF_WHEEL_CUDA) or PYTHON)
    pip_install(python, "-r", ROOT / "requirements" / "torch-cuda.txt", *BUILD_TOOLS)
    pip_install(python, "--no-build-isolation", source_archive())
    newest = run(python, "-P", "-c", ALLOCATES).strip()
    run(python, "-P", "-c", TWO_LINES)
    return f"allocators of torch {newest}; sources compile for {compile_for_oldest(python)}"


def compile_for_oldest(python: Path) -> str:
    """Reads the sources of both extensions with the headers of the oldest torch; the wheel's version.

    Its libraries, several GB with what they need, stay away, so nothing is linked.
    """
    folder = BUILD / "oldest-torch"
    requirement = ROOT / "requirements" / "torch-oldest.txt"
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "-r", requirement)
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
    wheel.unlink()
    headers = folder / "torch" / "include"
    includes = [headers, headers / "torch" / "csrc" / "api" / "include"]
    includes += [Path(place) for place in run(python, "-P", "-c", INCLUDES).split()]
    version = wheel.name.split("-")[1]
    flags = ("-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f'-DTEM_TORCH_VERSION="{version}"')

    def compile_one(source: Path) -> None:
        run("g++", *flags, "-Icsrc", *(flag for each in includes for flag in ("-isystem", str(each))), source)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        list(workers.map(compile_one, sorted((ROOT / "csrc" / "torch").glob("*.cpp"))))
    return version


def interpreter(version: str) -> str | None:
    """A working interpreter of that version, on PATH or among those that pyenv keeps."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))
    for candidate in [shutil.which(f"python{version}"), *map(str, kept)]:
        # What PATH finds may be a shim for a version that is not selected.
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None


def environment(name: str, base: str) -> Path:
    """A virtual environment of the interpreter `base`; its python."""
    folder = BUILD / name
    run(base, "-m", "venv", folder)
    return folder / "bin" / "python"


def pip_install(python: Path, *arguments: str | Path) -> None:
    run(python, "-m", "pip", "install", "--quiet", *arguments)


def source_archive() -> Path:
    """The source archive of the tree as it is."""
    folder = BUILD / "archive"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / run(PYTHON, "-c", ARCHIVE.format(folder=str(folder))).strip().splitlines()[-1]
