"""Objects of the core are made by many threads at once, and Python finds each of them again."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.programs import ROOT

# Threads are switched often and end soon, so that many are stopped amid the making of an object.
PROGRAM = """
import sys, threading, time
from torch_elastic_mem import _C

def make():
    for _ in range(10):
        made = _C.Attached(_C.host_backend(2 << 20), [2 << 20])
        del made

sys.setswitchinterval(1e-5)
end = time.monotonic() + 5
while time.monotonic() < end:
    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("all of them")
"""


def test_threads_make_objects_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "all of them\n"), done.stderr


def test_no_object_is_registered_without_the_gil() -> None:
    for path in (ROOT / "csrc" / "bindings").glob("*.cpp"):
        for method in re.split(r"\n\s*(?:\.def\w*\(|module\.def\(|py::class_)", path.read_text()):
            guarded = method.startswith(("py::init", "init_unlocked")) and "Unlocked()" in method
            assert not guarded, f"{path.name}: use init_unlocked, without a guard: {method}"
