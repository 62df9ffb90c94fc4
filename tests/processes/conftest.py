"""A real broker, and processes with real arenas that meet there."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import torch_elastic_mem as tem
from tests.broker.service import ROOT, Service
from tests.rungs import FakeRung, Rung
from torch_elastic_mem.broker.control import ControlClient
from torch_elastic_mem.broker.state import DeviceState

MiB = 1 << 20
LONG = 30.0
TENANT = [sys.executable, "-m", "tests.processes.tenant"]


class Refused(Exception):
    """What a tenant's call raised there."""


class Peer:
    """A tenant's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid: int = 0

    def ready(self) -> Peer:
        self.pid = self.hear()
        return self

    def tell(self, command: str, *arguments: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()

    def hear(self, timeout: float = LONG) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        assert ready, "the tenant says nothing"
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"the tenant ended with {self.process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise Refused(answer["says"])
        return answer

    def __call__(self, command: str, *arguments: object) -> Any:
        self.tell(command, *arguments)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def files(self) -> dict[int, int]:
        """Bytes that it has mapped of each memory file, by inode. A process makes one for its own memory."""
        found: dict[int, int] = {}
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            span, _, _, _, inode, *name = line.split()
            if "/memfd:torch_elastic_mem" in name:
                begin, end = (int(each, 16) for each in span.split("-"))
                found[int(inode)] = found.get(int(inode), 0) + end - begin
        return found


class Machine:
    """The broker and everything that was started on it."""

    def __init__(self, service: Service, device: str, uuid: str, library: str) -> None:
        self.service = service
        self.device = device
        self.uuid = uuid
        self.library = library
        self.peers: list[Peer] = []

    def launch(self, priority: str = "training", *, keep: bool = True, **extra: str) -> Peer:
        environment = os.environ | {"TEM_BROKER": str(self.service.path), "PYTHONPATH": str(ROOT)} | extra
        process = subprocess.Popen(
            [*TENANT, self.device, priority, "keep" if keep else "", self.library],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.peers.append(Peer(process))
        return self.peers[-1]

    def peer(self, priority: str = "training", *, keep: bool = True) -> Peer:
        return self.launch(priority, keep=keep).ready()

    def state(self) -> DeviceState | None:
        with ControlClient(self.service.directory / "control.sock") as control:
            devices = control.state().devices
        return next((device for device in devices if device.uuid == self.uuid), None)

    def await_leased(self, nbytes: int, timeout: float = LONG) -> None:
        deadline = time.monotonic() + timeout
        while True:
            state = self.state()
            leased = 0 if state is None else state.leased
            if leased == nbytes:
                return
            assert time.monotonic() < deadline, f"{leased} bytes are leased, not {nbytes}: {state}"
            time.sleep(0.02)

    def close(self) -> None:
        for peer in self.peers:
            peer.process.send_signal(signal.SIGCONT)
            peer.kill()
            for pipe in (peer.process.stdin, peer.process.stdout):
                if pipe is not None:
                    pipe.close()


@pytest.fixture
def machine(rung: Rung, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    uuid = "HOST"
    if rung.device != "host":
        with tem.Arena(rung.device, capacity="8MiB", broker=None) as arena:
            uuid = arena.uuid
    service = Service(tmp_path, "--device", f"{uuid}=128MiB", "--reserve", f"{uuid}=0,0")
    service.start()
    library = str(request.getfixturevalue("fake_library")) if isinstance(rung, FakeRung) else ""
    made = Machine(service, rung.device, uuid, library)
    yield made
    made.close()
    service.close()


Launch = Callable[..., Peer]


def preload(directory: Path, name: str) -> str:
    """A library of this folder's, to be loaded into processes before all others."""
    library = directory / f"{name}.so"
    compiler = (os.environ.get("CXX") or "g++").split()
    source = Path(__file__).parent / f"{name}.cpp"
    subprocess.run(
        [*compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True
    )
    return str(library)
