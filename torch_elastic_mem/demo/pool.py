"""Who holds what of the memory that both tenants share, and who gave it to whom."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch_elastic_mem as tem
from torch_elastic_mem.broker.control import ControlClient
from torch_elastic_mem.broker.state import DeviceState, Event

# A tenant's goodbye and a question of ours may reach the broker in either order.
_SETTLE_SECONDS = 2.0


@dataclass(frozen=True)
class Shares:
    """Bytes that the accounts hold at one moment, and that nobody does."""

    training: int
    serving: int
    free: int


class Pool(Protocol):
    """Looked at from one thread."""

    capacity: int

    def shares(self) -> Shares:
        """Who holds what."""

    def yields(self) -> list[tem.YieldRecord]:
        """The yields since the last call, or since this was made; oldest first."""


class ArenaPool:
    """An arena that both tenants are in."""

    def __init__(self, arena: tem.Arena) -> None:
        self._arena = arena
        self._seen = max((record.seq for record in arena.yields()), default=0)
        self.capacity = arena.capacity

    def shares(self) -> Shares:
        snapshot = self._arena.snapshot()
        held = {account.name: account.held for account in snapshot.accounts}
        return Shares(held.get("training", 0), held.get("serving", 0), snapshot.free)

    def yields(self) -> list[tem.YieldRecord]:
        found = self._arena.yields(since=self._seen)
        if found:
            self._seen = found[-1].seq
        return found


class BrokerPool:
    """A broker that nobody but the two tenants uses, each by an arena of its own.

    An account counts with its lease: what it may hold without asking is nobody else's.
    """

    def __init__(self, client: ControlClient, capacity: int) -> None:
        self._client = client
        self._seen = max((event.seq for event in client.events()), default=0)
        self.capacity = capacity

    def _devices(self) -> list[DeviceState]:
        return self._client.state().devices

    def shares(self) -> Shares:
        devices = self._devices()
        held = {account.name: account.lease for device in devices for account in device.accounts}
        free = sum(device.free for device in devices)
        return Shares(held.get("training", 0), held.get("serving", 0), free)

    def yields(self) -> list[tem.YieldRecord]:
        found = list(self._client.events(self._seen))
        if found:
            self._seen = found[-1].seq
        return [_record(event) for event in found if event.kind == "yield"]

    def leased(self) -> int:
        """Bytes that are still leased when both tenants have left."""
        end = time.monotonic() + _SETTLE_SECONDS
        while (left := sum(device.leased for device in self._devices())) and time.monotonic() < end:
            time.sleep(0.02)
        return left


def _record(event: Event) -> tem.YieldRecord:
    return tem.YieldRecord(
        seq=event.seq,
        start_ns=event.start_ns,
        duration_ns=event.duration_ns,
        demander=event.demander,
        victim=event.account,
        rung=event.rung,
        asked=event.asked,
        given=event.bytes,
    )
