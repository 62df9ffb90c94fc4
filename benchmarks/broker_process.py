"""A broker for a benchmark: `tem serve` as a process of its own, in a directory of its own."""

from __future__ import annotations

import importlib.util
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch_elastic_mem as tem
from benchmarks.worker import ROOT, WorkerError
from torch_elastic_mem.broker.control import ControlClient
from torch_elastic_mem.broker.paths import Paths

_SERVE = "from torch_elastic_mem.cli import main; main()"
_START_SECONDS = 30.0


class BrokerProcess:
    """A running broker.

    Args:
        options: of `tem serve`.
        config: what its configuration file says.

    Raises:
        WorkerError: it did not start; what it said is shown.
    """

    def __init__(self, options: Sequence[str], config: str = "") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tem-bench-")
        folder = Path(self._folder.name)
        self.paths = Paths(folder / "run")
        self._log = folder / "log"
        (folder / "broker.toml").write_text(config)
        where = ["--directory", str(self.paths.directory), "--config", str(folder / "broker.toml")]
        self._command = ["-c", _SERVE, "serve", *where, "--log", str(self._log), *options]
        self._process = self._start()

    @property
    def path(self) -> str:
        """The socket of its tenants."""
        return str(self.paths.tenants)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has logged, all starts together."""
        return self._log.read_text() if self._log.exists() else ""

    def resident(self) -> int:
        """Bytes of memory that it has."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def cpu_seconds(self) -> float:
        """Seconds of CPU that it has used since its start."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def control(self) -> ControlClient:
        """A new connection of an operator."""
        return ControlClient(self.paths.control)

    def kill(self) -> None:
        """Ends it as a crash would."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Starts another in its place."""
        self._process = self._start()

    def close(self) -> None:
        """Stops it, and removes what it left."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        self._folder.cleanup()

    def __enter__(self) -> BrokerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *self._command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        end = time.monotonic() + _START_SECONDS
        with process.stdout as said:
            ready = select.select([said], [], [], max(0.0, end - time.monotonic()))[0]
            line = said.readline() if ready else ""
            if "ready at" not in line:
                process.kill()
                raise WorkerError(f"the broker did not start: {line}{said.read()}{self.log}")
        return process


def broker_for(arena: tem.Arena, capacity: int, free: int) -> BrokerProcess:
    """A broker for the device of `arena`.

    Args:
        arena: one without a broker; only read.
        capacity: bytes to share out. A GPU that the broker can see into is shared out whole.
        free: bytes beside them that are never leased, and so stay free on the device.
    """
    device = "HOST" if arena.backend == "host" else arena.uuid
    options = ["--reserve", f"{device}={free},{free}"]
    if arena.backend == "host" or importlib.util.find_spec("pynvml") is None:
        options += ["--device", f"{device}={capacity + free}"]
    return BrokerProcess(options)
