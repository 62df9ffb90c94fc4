"""`tem serve` as a process, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.broker.tenant import LONG, MiB, Tenant

ROOT = Path(__file__).resolve().parents[2]
# What a dead process held is granted again within a second; the rest is for a busy machine.
SOON = 10.0
SERVE = "from torch_elastic_mem.cli import main; main()"


def actor(path: Path, step: str, bytes: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.broker.actor", str(path), step, str(bytes)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def hear(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert word in line, f"{word!r} was awaited, {line!r} came"


class Service:
    """A broker of 100 MiB without a reserve."""

    def __init__(self, directory: Path, *options: str, config: str = "", before: str = "") -> None:
        self.directory = directory / "run"
        self.log = directory / "log"
        self.config = directory / "broker.toml"
        self.config.write_text(config)
        self.options = options
        self.before = before
        self.descriptors: tuple[int, ...] = ()
        self.process: subprocess.Popen[str] | None = None

    @property
    def path(self) -> Path:
        return self.directory / "tenants.sock"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> Service:
        self.process = self.launch(subprocess.PIPE)
        hear(self.process, f"ready at {self.path}")
        return self

    def launch(self, out: int) -> subprocess.Popen[str]:
        options = ["--device", "HOST=100MiB", "--reserve", "HOST=0,0", "--log", str(self.log)]
        where = ["--directory", str(self.directory), "--config", str(self.config)]
        return subprocess.Popen(
            [sys.executable, "-c", self.before + SERVE, "serve", *where, *options, *self.options],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=self.descriptors,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(LONG)
        self.process = None
        return code

    def close(self) -> None:
        if self.process is not None:
            self.stop(signal.SIGKILL)

    def tenant(self, name: str = "tenant") -> Tenant:
        return Tenant(self.path, name)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


__all__ = ["SOON", "MiB", "Service", "actor", "hear"]
