"""What the programs tell that run an engine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.broker.service import Service
from tests.programs import end, start
from torch_elastic_mem.broker.control import ControlClient

# What an interpreter is to run, before an account's other options and a program.
TEM_RUN = ["-c", "from torch_elastic_mem.cli import main; main()", "run"]
TEM_RUN += ["--priority", "serving", "--name", "chat"]

# A GPU's kernels sum in an order that depends on which requests share a step, so that vLLM itself answers
# otherwise where it preempts somebody. In this mode they do not, and tokens are equal or something is wrong.
ALIKE = {"VLLM_BATCH_INVARIANT": "1"} if torch.cuda.is_available() else {}


def read(line: str) -> tuple[str, Any]:
    told = json.loads(line)
    return told["fact"], told["value"]


def facts(scenario: str, shape: str = "tiny", program: str = "tests.vllm.engine") -> dict[str, Any]:
    done = end(start("-m", program, scenario, shape, TEM_BROKER="0", **ALIKE), timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(map(read, done.stdout.splitlines()))


def under_tem_run(runtime: Path, *options: str) -> subprocess.Popen[str]:
    """An engine whose core is a process of its own, with a broker that `tem run` starts for it."""
    return run_by_tem(runtime, "apart", *options)


def run_by_tem(runtime: Path, scenario: str, *options: str) -> subprocess.Popen[str]:
    """An engine in the process that `tem run` starts, and a broker of its own."""
    engine = [sys.executable, "-m", "tests.vllm.engine", scenario, "tiny"]
    return start(*TEM_RUN, *options, "--", *engine, TEM_RUNTIME_DIR=str(runtime), **ALIKE)


class Apart:
    """An engine whose core is a process of its own, under a broker."""

    def __init__(
        self,
        service: Service,
        scenario: str = "apart",
        program: str = "tests.vllm.engine",
        how: str = "tiny",
    ) -> None:
        self.service = service
        self.program = start("-m", program, scenario, how, TEM_BROKER=str(service.path), **ALIKE)

    def fact(self) -> Any:
        assert self.program.stdout is not None
        line = self.program.stdout.readline()
        assert line, self.program.communicate()[1][-5000:]
        return read(line)[1]

    def go_on(self) -> None:
        assert self.program.stdin is not None
        self.program.stdin.write("\n")
        self.program.stdin.flush()

    def end(self) -> None:
        """Ends the program, and the engine's core, which would keep its pipes open."""
        if self.program.poll() is None:
            subprocess.run(["pkill", "-KILL", "-P", str(self.program.pid)], check=False)
            self.program.kill()
        self.program.communicate()

    def held(self) -> int:
        with ControlClient(self.service.directory / "control.sock") as control:
            accounts = [each for device in control.state().devices for each in device.accounts]
        return sum(each.held for each in accounts if each.name == "vllm")

    def comes_down_to(self, most: int) -> bool:
        deadline = time.monotonic() + 10
        while self.held() > most and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.held() <= most
