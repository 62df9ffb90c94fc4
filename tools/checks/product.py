"""Steps that run the package as it is installed beside this interpreter."""

from __future__ import annotations

import ctypes
import json

from checks.shell import BUILD, PYTHON, Failed, pytest, run, seconds, tool

EVERYDAY = "not slow and not gpu"
REPORT_KEYS = {
    "ok",
    "loss_equal",
    "tokens_equal",
    "yields",
    "given_bytes",
    "returned_bytes",
    "leaked_bytes",
    "backend",
}


def suites() -> str:
    """The tests on each rung: this machine's memory, the strict fake driver, and a GPU where there is one."""
    closing = [pytest("-m", EVERYDAY)]
    if not gpu_count():
        return "\n".join(["rungs host and fake; no GPU on this machine", *closing])
    # A process of its own: in the first, the fake answers to the driver's name.
    closing.append(pytest("--rung", "cuda", "-m", "not slow"))
    return "\n".join(["rungs host, fake and cuda", *closing])


def gpu_count() -> int:
    """The CUDA devices that this machine's driver sees."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def demo() -> str:
    """The main job, shortened, and the keys of its report."""
    out = BUILD / "demo"
    report = json.loads(run(tool("tem"), "demo", "--seconds", "8", "--json", "--plain", "--out", out))
    if missing := REPORT_KEYS - report.keys():
        raise Failed(f"the report of `tem demo` lacks {', '.join(sorted(missing))}")
    wrong = [key for key in ("ok", "loss_equal", "tokens_equal") if report[key] is not True]
    if wrong or report["leaked_bytes"]:
        raise Failed(f"`tem demo` proved less than it should:\n{json.dumps(report, indent=2)}")
    return f"backend {report['backend']}, {report['yields']} yields"


def startup() -> str:
    """How soon the package and its command line are there, and that torch stays out of both."""
    run(PYTHON, "-c", "import sys, torch_elastic_mem; sys.exit('torch' in sys.modules)")
    nothing = seconds(PYTHON, "-c", "pass")
    imported = seconds(PYTHON, "-c", "import torch_elastic_mem") - nothing
    helped = seconds(tool("tem"), "--help")
    return f"import torch_elastic_mem {imported * 1e3:.0f} ms, tem --help {helped * 1e3:.0f} ms"
