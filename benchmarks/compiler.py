"""Libraries and programs that benchmarks time things in, built with $CXX when they are first asked for."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

BUILD_DIR = Path(__file__).parents[1] / "build" / "benchmarks"
FLAGS = ["-O2", "-pthread", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"]


class BuildError(RuntimeError):
    """There is no compiler, or it refused the sources; says which and what it said."""


def shared_library(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str],
    link: Sequence[str] = (),
    *,
    headers: Sequence[Path] = (),
) -> Path:
    """The library of the sources as they are now; built if it is not there yet.

    Args:
        name: what its file is called, behind a hash.
        sources: the files to compile.
        flags: for the compiler, besides `FLAGS`.
        link: for the linker, behind the sources.
        headers: files that make it stale besides the sources.

    Raises:
        BuildError: no compiler, or one that failed.
    """
    return _built(f"{name}.so", ["-fPIC", "-shared", *flags], sources, link, headers)


def program(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str],
    link: Sequence[str] = (),
    *,
    headers: Sequence[Path] = (),
) -> Path:
    """The program of the sources as they are now; otherwise as `shared_library`."""
    return _built(name, flags, sources, link, headers)


def _built(
    name: str, flags: Sequence[str], sources: Sequence[Path], link: Sequence[str], headers: Sequence[Path]
) -> Path:
    command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, *flags]
    digest = hashlib.sha256(shlex.join([*command, *link]).encode())
    for path in [*sources, *headers]:
        digest.update(path.read_bytes())
    target = BUILD_DIR / f"{digest.hexdigest()[:16]}-{name}"
    if target.exists():
        return target
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD_DIR) as folder:
        made = Path(folder) / target.name
        whole = [*command, *map(str, sources), "-o", str(made), *link]
        try:
            done = subprocess.run(whole, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise BuildError(f"no C++ compiler {command[0]!r}: install one or set CXX") from error
        if done.returncode != 0:
            raise BuildError(f"{name} does not build: {shlex.join(whole)}\n{done.stderr}")
        made.replace(target)
    return target
