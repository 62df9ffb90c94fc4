"""What must hold of a broker's state at every moment of a soak, and when everybody has gone."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import torch_elastic_mem as tem
from benchmarks.broker_process import BrokerProcess
from torch_elastic_mem.broker.state import DeviceState, MachineState

_EVERY = 0.01
_GONE_SECONDS = 10.0


class Watch:
    """Looks at a broker all the time, from a thread of its own.

    Attributes:
        samples: how often it has looked. most: bytes leased at most. wrong: what did not hold, once each.
        last: the state that it saw last. grants, asks: of all brokers that it saw.
        away: the broker is being replaced, and need not answer.
    """

    def __init__(self, broker: BrokerProcess) -> None:
        self.samples = 0
        self.most = 0
        self.wrong: dict[str, str] = {}
        self.last: MachineState | None = None
        self.away = threading.Event()
        self._broker = broker
        self._shared = 0
        self._counts: dict[int, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    @property
    def grants(self) -> int:
        """Demands granted."""
        return sum(grants for grants, _ in self._counts.values())

    @property
    def asks(self) -> int:
        """Asks sent to those that had to give."""
        return sum(asks for _, asks in self._counts.values())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def lost(self) -> int:
        """Bytes still leased when everybody has gone, or not free though nobody has them."""
        end = time.monotonic() + _GONE_SECONDS
        while True:
            with self._broker.control() as control:
                state = control.state()
            left = sum(
                max(device.leased, device.capacity - device.reserve_low - device.free)
                for device in state.devices
            )
            if not left or time.monotonic() >= end:
                return left
            time.sleep(0.05)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._broker.control() as control:
                    while not self._stop.wait(_EVERY):
                        self._look(control.state())
            except tem.BrokerError as error:
                if not self.away.is_set() and not self._stop.is_set():
                    self.wrong.setdefault("the broker", str(error))
            self._stop.wait(_EVERY)

    def _look(self, state: MachineState) -> None:
        self.samples += 1
        self.last = state
        self._counts[state.epoch] = state.grants, state.asks
        for device in state.devices:
            self.most = max(self.most, device.leased)
            self._check(device)

    def _check(self, device: DeviceState) -> None:
        leases = sum(account.lease for account in device.accounts)
        # A GPU's capacity sinks when others take of it, while leases of before are still there.
        self._shared = max(self._shared, device.capacity - device.reserve_low)
        if leases != device.leased:
            self.wrong.setdefault("sums", f"{leases} B are the accounts' leases, and {device.leased} leased")
        if device.leased > self._shared:
            self.wrong.setdefault("capacity", f"{device.leased} B were leased of {self._shared}")
