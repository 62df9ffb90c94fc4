"""Steps that run the core under the compiler's sanitizers: its suites, and the programs in tests/cpp."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from checks.product import EVERYDAY
from checks.shell import BUILD, PYTHON, Failed, Skipped, closing_line, run


def asan() -> str:
    """Addresses, leaks of the programs, and undefined behaviour."""
    library = BUILD / "address"
    run(
        *(PYTHON, "setup.py", "build", "--build-base", library, "--build-lib", library / "lib"),
        env={"TEM_SANITIZE": "address", "CFLAGS": "-Werror"},
    )
    (objects,) = library.glob(f"temp.*-{sys.implementation.cache_tag}/csrc")
    passed = programs("address", objects)
    # The interpreter is not instrumented, so the runtime must come first, and libstdc++ with it: the runtime
    # looks for __cxa_throw once, when the process starts. Leaks are for the programs to find: CPython keeps
    # objects to the end.
    env = {
        "PYTHONPATH": str(library / "lib"),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=15",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # --capture=sys leaves the runtime's last words on the real stderr.
    options = ("--capture=sys", "--timeout=600", "-m", EVERYDAY)
    output = run(PYTHON, "-P", "tools/checks/instrumented.py", library / "lib", *options, env=env)
    return f"{passed}; suites\n{closing_line(output)}"


def tsan() -> str:
    """Data races, in the programs: CPython under the thread sanitizer reports its own."""
    return programs("thread")


def programs(sanitizer: str, objects: Path | None = None) -> str:
    """Builds and runs tests/cpp with a sanitizer, over a fake driver that has the same.

    Args:
        sanitizer: which.
        objects: a folder with the core, compiled with it already.
    """
    flag = {"address": "address,undefined", "thread": "thread"}[sanitizer]
    building = f"from build import build; print(build({str(BUILD / 'fake' / sanitizer)!r}, {flag!r}))"
    fake = run(PYTHON, "-c", building, env={"PYTHONPATH": "tests/fake_cuda"}).strip()
    output = run(
        *("make", "--no-print-directory", "-C", "tests/cpp", f"--jobs={os.cpu_count()}", "check"),
        *(f"SANITIZE={sanitizer}", f"OUT={BUILD / 'cpp' / sanitizer}", f"FAKE={fake}"),
        *(() if objects is None else (f"BUILT={objects}",)),
    )
    passed = sum(line.startswith("passed: ") for line in output.splitlines())
    if not passed:
        raise Failed("tests/cpp has no program")
    return f"{passed} runs of programs"


def runtime(library: str) -> Path:
    """The compiler's own copy of a runtime library."""
    path = Path(run("g++", f"-print-file-name={library}").strip())
    if not path.is_absolute():
        raise Skipped(f"g++ has no {library}")
    return path
