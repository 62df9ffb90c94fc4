"""Each tenant in a process and an arena of its own. They meet through a broker that is started for them."""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

from torch_elastic_mem.broker.control import ControlClient
from torch_elastic_mem.broker.launch import launch
from torch_elastic_mem.broker.paths import Paths
from torch_elastic_mem.demo.device import setting_for
from torch_elastic_mem.demo.pool import BrokerPool
from torch_elastic_mem.demo.remote import Remote
from torch_elastic_mem.demo.side import (
    ServedAgain,
    ServingMoment,
    ServingOutcome,
    TrainingMoment,
    TrainingOutcome,
)

_STOP_SECONDS = 5.0
# For a broker whose demo was killed.
_IDLE_EXIT = 30


class TwoProcesses:
    """A pair under a broker of its own, in a directory of its own.

    Args:
        backend: "host", "cuda" or "cuda:1".
        capacity: Of what the broker shares out, in bytes; None for what suits the backend.
        seconds: Length of the elastic phase.

    Raises:
        InvalidArgument: The capacity does not suit the demo. TemError: A process did not start.
    """

    processes = 2

    def __init__(self, backend: str, capacity: int | None, seconds: float) -> None:
        if capacity is not None or backend == "host":
            setting_for(backend, capacity, 0, seconds)  # refused before anything starts
        with ExitStack() as opened:
            # Short: a socket's path has room for a hundred bytes.
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="tem-demo-", dir="/tmp")))
            self.training = Remote(
                "training", backend, folder, TrainingMoment(), TrainingOutcome, list[float]
            )
            opened.callback(self.training.cancel)
            self.serving = Remote("serving", backend, folder, ServingMoment(), ServingOutcome, ServedAgain)
            opened.callback(self.serving.cancel)
            found = self.training.found()
            self.device = found.device
            # What is free before either has a context: the second's takes no more than the rest has room for.
            self.setting = setting_for(backend, capacity, found.free, seconds)
            shared = self.setting.capacity
            paths = Paths(folder / "run")
            paths.directory.mkdir(mode=0o700)
            options = ["--device", f"{found.uuid}={shared}", "--reserve", f"{found.uuid}=0,0"]
            options += ["--idle-exit", str(_IDLE_EXIT)]
            broker = launch(paths.directory, options, folder / "broker.log")
            opened.callback(_stop, broker)
            self.broker_pid = broker.pid
            self.serving.found()
            for side in (self.training, self.serving):
                side.open(str(paths.tenants), shared, seconds)
            for side in (self.training, self.serving):
                side.opened()
            self.pool = BrokerPool(opened.enter_context(ControlClient(paths.control)), shared)
            self._opened = opened.pop_all()

    def __enter__(self) -> TwoProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        with self._opened, ExitStack() as tenants:
            # Before the broker goes, so that they can tell it goodbye.
            tenants.callback(self.training.cancel)
            tenants.callback(self.serving.cancel)

    def close(self) -> int:
        """Closes both tenants; returns the bytes that had not come back to their arenas or to the broker."""
        leaked = self.serving.close() + self.training.close()
        return leaked + self.pool.leased()


def _stop(broker: subprocess.Popen[bytes]) -> None:
    broker.terminate()
    try:
        broker.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        broker.kill()
        broker.wait()
