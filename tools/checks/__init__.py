"""The steps of tools/check.py, cheapest first: a slip in one line should not wait for the sanitizers."""

from __future__ import annotations

from collections.abc import Callable

from checks import engines, packaging, product, sanitizers, static

# A step returns what it found out (its first line stands in its row), or raises Failed or Skipped.
STEPS: dict[str, Callable[[], str]] = {
    "lint": static.lint,
    "types": static.types,
    "layers": static.layers,
    "startup": product.startup,
    "suites": product.suites,
    "demo": product.demo,
    "engine": engines.engine,
    "vllm": engines.vllm,
    "tsan": sanitizers.tsan,
    "pythons": packaging.pythons,
    "wheel-cuda": packaging.wheel_cuda,
    "asan": sanitizers.asan,
}

# They compile and install for the most part, and run beside the others, in what those leave of the machine.
BESIDE = ("engine", "tsan", "pythons", "wheel-cuda", "asan")

# Left out of a run that names no steps, except in CI.
ON_REQUEST = {"engine": "installs 3 GB", "vllm": "installs 3 GB", "wheel-cuda": "installs several GB"}
