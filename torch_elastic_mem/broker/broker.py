"""The broker of one machine: the books of all its devices, and what operators may ask of them."""

from __future__ import annotations

import os
import time

import torch_elastic_mem
from torch_elastic_mem.broker.journal import Journal
from torch_elastic_mem.broker.state import Event, MachineState


class Broker:
    """The books of all devices of a machine.

    Not thread-safe: everything is called from the broker's loop, and returns at once but for `reclaim`.
    """

    def __init__(self) -> None:
        self.epoch = time.time_ns()
        self.journal = Journal()
        self._started = time.monotonic()

    def state(self) -> MachineState:
        """What every account of every device holds at this moment."""
        return MachineState(
            version=torch_elastic_mem.__version__,
            pid=os.getpid(),
            epoch=self.epoch,
            uptime=time.monotonic() - self._started,
            clients=0,
            grants=self.journal.grants,
            denials=self.journal.denials,
            asks=self.journal.asks,
            devices=[],
        )

    def events(self, since: int) -> list[Event]:
        """The events after number `since` that are still kept (the last 65,536), oldest first."""
        return self.journal.since(since)

    def set_limits(self, device: str | None, name: str, **limits: object) -> int:
        """Sets limits of accounts, present and to come; the tenants are told and bring themselves under.

        Args:
            device: its UUID or label; None for all.
            name: of the accounts, or "name/pid" for that of one process, or the name of a class.
            limits: of `min`, `low`, `high`, `max` (bytes or texts; None for no high or max) and `weight`. What is
                not given stays.

        Returns:
            How many accounts were changed.

        Raises:
            InvalidArgument: there is no such device or account, or the limits contradict each other.
            AdmissionError: a `min` does not fit. Nothing was changed for the account that the message names.
        """
        raise NotImplementedError

    def set_priority(self, name: str, priority: str | int) -> int:
        """Moves accounts to another class, by its name or value; otherwise as `set_limits`.

        Returns:
            How many accounts were changed.

        Raises:
            InvalidArgument: there is no such account or class.
        """
        raise NotImplementedError

    async def reclaim(self, name: str, bytes: int, timeout: float) -> int:
        """Asks accounts for memory, up every rung that they have, and waits until they have answered.

        Args:
            name: as in `set_limits`.
            bytes: how much in all. An account's `min` stays.
            timeout: seconds.

        Returns:
            Bytes given by then. They are free for whoever asks next.

        Raises:
            InvalidArgument: there is no such account.
        """
        raise NotImplementedError
