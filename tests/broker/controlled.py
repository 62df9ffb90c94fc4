"""A broker of canned answers behind a real control socket, on a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tests.broker.machine import machine
from torch_elastic_mem.broker.control_server import ControlServer
from torch_elastic_mem.broker.state import Event, MachineState
from torch_elastic_mem.errors import AdmissionError, InvalidArgument


class CannedBroker:
    """Says what it was given to say, and notes what it was asked."""

    def __init__(self) -> None:
        self.now = machine()
        self.happened: list[Event] = []
        self.calls: list[tuple[Any, ...]] = []
        self.comes = 0
        self.words = "asked min 100 GiB, free 78 GiB"

    def state(self) -> MachineState:
        return self.now

    def events(self, since: int) -> list[Event]:
        return [event for event in self.happened if event.seq > since]

    def set_limits(self, device: str | None, name: str, **limits: Any) -> int:
        found = self._known(name)
        if (limits.get("min") or 0) > 78 << 30:
            raise AdmissionError(self.words)
        self.calls.append(("limits", device, name, limits))
        return found

    def set_priority(self, name: str, priority: str) -> int:
        found = self._known(name)
        self.calls.append(("priority", name, priority))
        return found

    async def reclaim(self, name: str, count: int, timeout: float) -> int:
        self.calls.append(("reclaim", name, count, timeout))
        await asyncio.sleep(0)
        return min(count, self.comes)

    def _known(self, name: str) -> int:
        found = sum(
            name in (each.name, each.priority) for device in self.now.devices for each in device.accounts
        )
        if not found:
            raise InvalidArgument(f"no account {name!r}")
        return found


class Control:
    """The socket of a canned broker; closed by `close`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "control.sock"
        self.broker = CannedBroker()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.server = self.run(ControlServer.start(self.broker, self._listener))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def call(self, work: Callable[[], Any]) -> Any:
        async def called() -> Any:
            return work()

        return self.run(called())

    def close(self) -> None:
        if self._thread.is_alive():
            self.run(self.server.close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()
