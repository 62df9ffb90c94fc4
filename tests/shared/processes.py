"""A broker and members as processes of their own, and what the kernel shows of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch_elastic_mem as tem

ROOT = Path(__file__).resolve().parents[2]
MiB = 1 << 20
LONG = 30.0


def until(holds: Callable[[], bool], seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)


class Broker:
    """`tem serve`, without its control socket: states come by the broker's own words on stdout.

    They are of `device`, a UUID; if that is empty, of the device that somebody came for last.
    """

    def __init__(self, directory: Path, files: int | None = None) -> None:
        self.device = ""
        self.path = str(directory / "tenants.sock")
        self.shares = directory / "shares.sock"
        limit = [] if files is None else [str(files)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.shared.serve", str(directory), *limit],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._said()

    def _said(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def state(self) -> Any:
        assert self.process.stdin
        self.process.stdin.write(self.device + "\n")
        self.process.stdin.flush()
        return self._said()

    def leased(self) -> int:
        return int(self.state()["leased"])

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(LONG)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
        return code


class Sharer:
    """Another process that shares and attaches, as it is told; see member.py."""

    def __init__(self, broker: Broker, device: str = "host", library: str = "", **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.shared.member", broker.path, device, library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
        self._ready = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"the member ended: {self.process.wait(LONG)}")
        answer = json.loads(line)
        if len(answer) == 2:
            raise getattr(tem, answer[0], RuntimeError)(answer[1])
        return answer[0]

    def ask(self, *command: Any) -> Any:
        assert self.process.stdin
        if not self._ready:
            self._answer()
            self._ready = True
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LONG)

    def end(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
