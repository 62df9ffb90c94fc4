"""Steps that read the sources and run none of them."""

from __future__ import annotations

from checks.shell import PYTHON, ROOT, pytest, run, tool

NATIVE_FOLDERS = ("csrc", "tests", "benchmarks")
# The link torch_elastic_mem/integrations brings integrations/ in under the name it is imported by.
TYPED = ("torch_elastic_mem", "benchmarks", "examples", "tools/check.py", "tools/environment.py")


def lint() -> str:
    """Style of Python, C++ and prose."""
    run(tool("ruff"), "check", ".")
    run(tool("ruff"), "format", "--check", ".")
    native = sorted(
        path
        for folder in NATIVE_FOLDERS
        for pattern in ("*.cpp", "*.hpp", "*.h")
        for path in (ROOT / folder).rglob(pattern)
    )
    if native:
        run(tool("clang-format"), "--dry-run", "-Werror", *native)
    run(tool("codespell"))
    return f"ruff, clang-format over {len(native)} files, codespell"


def types() -> str:
    """Types by mypy --strict, over everything but the tests: they run instead."""
    folders = [name for name in TYPED if not (ROOT / name).is_dir() or any((ROOT / name).glob("*.py"))]
    return run(PYTHON, "-m", "mypy", "--strict", *folders, env={"MYPYPATH": "tools"}).strip()


def layers() -> str:
    """Who may import and include whom."""
    return pytest("tests/test_layers.py").strip("= ")
