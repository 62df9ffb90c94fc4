"""The broker of one machine: the books of all its devices, and what operators may ask of them."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable

from torch_elastic_mem.broker.books import Books
from torch_elastic_mem.broker.config import Config, LimitsConfig, memory_of_the_machine
from torch_elastic_mem.broker.device import Device
from torch_elastic_mem.broker.device_view import DeviceView, NoView, Reading
from torch_elastic_mem.broker.grace import Grace
from torch_elastic_mem.broker.groups import Groups
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.journal import Journal
from torch_elastic_mem.broker.need import Need
from torch_elastic_mem.broker.protocol import (
    HOST,
    PAUSE,
    Close,
    Demand,
    Gave,
    Hello,
    Message,
    Open,
    Pass,
    ProtocolError,
    Refused,
    Report,
    Return,
    SetLimits,
    Welcome,
    Withdraw,
)
from torch_elastic_mem.broker.rules import kind_of, limits_rule, with_rule
from torch_elastic_mem.broker.session import Letter, Process, Session
from torch_elastic_mem.broker.state import Event, MachineState
from torch_elastic_mem.broker.tills import Tills
from torch_elastic_mem.errors import InvalidArgument, TemError
from torch_elastic_mem.priority import HIGHEST_VALUE, LOWEST_VALUE
from torch_elastic_mem.priority import priority as priority_class
from torch_elastic_mem.version import VERSION


class Broker:
    """The books of all devices of a machine, and the sessions that speak to them.

    It does no I/O: what is to be sent is in `post` after each call, and `wake` says when to call `tick`.

    Not thread-safe: everything is called from the broker's loop, and returns at once. Between two calls
    its tills grant what needs no decision.

    Args:
        config: what the operator wants.
        view: what the devices show.
        grace: seconds from now in which nothing is granted, for the tenants of a broker that has died to come
            back; see `end_grace`.
        started: the clock tick since boot at which the broker's process started; processes from before may
            hold what another broker granted.
        clock: seconds, monotonic.

    Attributes:
        post: messages to send, in order; the server empties it.
        books: of every device, by UUID. tills: what is granted between two calls.
    """

    def __init__(
        self,
        config: Config | None = None,
        view: DeviceView | None = None,
        grace: float = 0.0,
        started: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epoch = time.monotonic_ns()
        self.journal = Journal()
        self.post: list[Letter] = []
        self.clock = clock
        self._config = config or Config()
        self._view = view or NoView()
        self._started = clock()
        self._grace = Grace(self._started + grace if grace else 0.0)
        self._start_tick = started
        self._groups = Groups()
        self._set: list[LimitsConfig] = []
        self._rules: list[LimitsConfig] = list(self._config.limits)
        self.books: dict[str, Books] = {}
        self._sessions: dict[Session, Books] = {}
        self.tills = Tills(self.books, self._grace, clock)
        self._waiters: list[tuple[Callable[[float], bool], asyncio.Event]] = []
        if HOST in self._config.device:
            self._books_of(Hello(HOST, "host", HOST, "", 0, 1))

    # The operators' side.

    def state(self) -> MachineState:
        """What every account of every device holds at this moment."""
        now = self.clock()
        return MachineState(
            version=VERSION,
            pid=os.getpid(),
            epoch=self.epoch,
            uptime=now - self._started,
            clients=len(self._sessions),
            grants=self.journal.grants,
            denials=self.journal.denials,
            asks=self.journal.asks,
            devices=[books.state(now) for books in self.books.values()],
        )

    def events(self, since: int) -> list[Event]:
        """The events after number `since` that are still kept (the last 65,536), oldest first."""
        return self.journal.since(since)

    def set_limits(self, device: str | None, name: str, **limits: object) -> int:
        """Sets limits of accounts, present and to come; the tenants are told and bring themselves under.

        Args:
            device: its UUID or label; None for all.
            name: of the accounts, or "name/pid" for that of one process, or the name of a class.
            limits: of `min`, `low`, `high`, `max` (bytes or texts; None for no high or max) and `weight`.
                What is not given stays.

        Returns:
            How many accounts were changed.

        Raises:
            InvalidArgument: there is no such device or account, or the limits contradict each other.
            AdmissionError: a `min` does not fit. No limit was changed.
        """
        return self._add_rule(limits_rule(name, device, limits))

    def set_priority(self, name: str, priority: str | int) -> int:
        """Moves accounts to another class, by its name or value; otherwise as `set_limits`.

        Returns:
            How many accounts were changed.

        Raises:
            InvalidArgument: there is no such account or class.
        """
        if isinstance(priority, int) and not LOWEST_VALUE <= priority <= HIGHEST_VALUE:
            raise InvalidArgument(f"value {priority} is not between {LOWEST_VALUE} and {HIGHEST_VALUE}")
        if isinstance(priority, str):
            known = priority_class(priority)
            return self._add_rule(LimitsConfig(name, priority=known.name, value=known.value))
        return self._add_rule(LimitsConfig(name, priority=str(priority), value=priority))

    def reclaim(self, name: str, bytes: int, timeout: float) -> Awaitable[int]:
        """Asks accounts for memory, up every rung that they have; then one can wait until they have answered.

        Args:
            name: as in `set_limits`.
            bytes: how much in all. An account's `min` stays.
            timeout: seconds.

        Returns:
            Bytes given by then. They are free for whoever asks next.

        Raises:
            InvalidArgument: there is no such account.
        """
        now = self.clock()
        needs: list[tuple[Books, Need]] = []
        left = bytes
        for books, holders in self._called(None, name):
            part = min(left, sum(max(0, holder.lease - holder.limits.min) for holder in holders))
            if part:
                left -= part
                need = Need("operator", PAUSE, now, now + timeout)
                needs.append((books, need))
                books.reclaim(need, holders, part, now)

        def finished(now: float) -> bool:
            # Each is looked at: one that is done is forgotten by its books.
            settled = [books.settled(need, now) for books, need in needs]
            return all(settled)

        answered = asyncio.Event()

        async def gained() -> int:
            await answered.wait()
            return sum(need.gained for _, need in needs)

        self._waiters.append((finished, answered))
        self._turn(now)
        return gained()

    def configure(self, config: Config) -> None:
        """Takes another configuration. Rights count for what is asked from now on.

        Raises:
            InvalidArgument, AdmissionError: a limit of an account cannot be set; the message says which.
        """
        now = self.clock()
        self._config = config
        for books in self.books.values():
            found = config.device_of(*books.device.names)
            limit = found.capacity_of(books.device.uuid, books.device.total)
            books.follow(limit, found.reserve_of(books.device.backend, limit), now)
        self._rules[:] = [*config.limits, *self._set]
        for books in self.books.values():
            books.enforce(now)
        self._turn(now)

    # The tenants' side.

    def end_grace(self, seconds: float) -> None:
        """Everybody who could come back is there, or gone: the grace lasts at most so much longer."""
        self._grace.until = min(self._grace.until, self.clock() + seconds)

    def connections_of(self, uid: int) -> int:
        """How many connections a user may have."""
        return self._config.grant_of(uid).connections

    def hello(self, process: Process, request: int, message: Hello) -> Session:
        """Begins a session.

        Raises:
            InvalidArgument: the device cannot be.
        """
        if (message.device == HOST) != (message.backend == "host") or not message.device:
            raise InvalidArgument(f"device '{message.device}' has no backend '{message.backend}'")
        if message.granularity == 0 or message.total == 0:
            raise InvalidArgument(f"device '{message.device}' of {message.total} bytes has nothing to share")
        books = self._books_of(message)
        session = Session(process, message.process, message.granularity)
        self._sessions[session] = books
        self.post.append((session, request, Welcome(self.epoch, books.device.most)))
        return session

    def receive(self, session: Session, request: int, message: Message) -> None:
        """Does what a process says.

        Raises:
            ProtocolError: it says what cannot be; the connection is to be closed.
        """
        books = self._sessions[session]
        now = self.clock()
        try:
            match message:
                case Demand():
                    books.demand(session, request, message, now)
                case Return():
                    books.give_back(session, message, now)
                case Pass():
                    books.pass_on(session, request, message)
                case Gave():
                    books.gave(session, request, message, now)
                case Report():
                    books.report(session, message)
                case Withdraw():
                    books.withdraw(session, request, now)
                case Open():
                    process = session.process
                    trusted = process.uid in (0, os.geteuid()) or process.start < self._start_tick
                    books.open(session, request, message, self._config.grant_of(process.uid), trusted, now)
                case SetLimits():
                    rights = self._config.grant_of(session.process.uid)
                    books.set_limits(session, request, message, rights, now)
                case Close():
                    books.close(session, request, message, now)
                case _:
                    raise ProtocolError(f"{type(message).__name__.upper()} is not a process's to say here")
        except ProtocolError:
            raise
        except TemError as error:
            self.post.append((session, request, Refused(kind_of(error), str(error))))
        self._turn(now)

    def leave(self, session: Session) -> None:
        """The process has said BYE."""
        now = self.clock()
        self._sessions.pop(session).leave(session, now)
        self._turn(now)

    def lose(self, session: Session) -> None:
        """The connection has ended without BYE, or was closed for what it said."""
        now = self.clock()
        self._sessions.pop(session).lose(session, now)
        self._turn(now)

    def bury(self, process: Process) -> None:
        """The process is gone, and its connections have been lost."""
        now = self.clock()
        for books in self.books.values():
            books.bury(process, now)
        self._turn(now)

    def holds(self, process: Process) -> bool:
        """The process has accounts."""
        return any(
            holder.session.process is process
            for books in self.books.values()
            for holder in books.accounts.holders.values()
        )

    # Time.

    def visible(self) -> list[str]:
        """The devices that something can be seen of."""
        return [uuid for uuid, books in self.books.items() if books.device.used is not None]

    def look(self, readings: dict[str, Reading]) -> None:
        """Takes in what devices show, by UUID."""
        now = self.clock()
        for uuid, reading in readings.items():
            self.books[uuid].look(reading, now)
        self._turn(now)

    def wake(self) -> float:
        """When to call `tick` next, in seconds of the clock; infinity for never."""
        now = self.clock()
        return min((books.wake(now) for books in self.books.values()), default=math.inf)

    def tick(self) -> None:
        """Does what is due."""
        now = self.clock()
        for books in self.books.values():
            books.settle(now)
        self._turn(now)

    def _turn(self, now: float) -> None:
        """What one device's books have changed for another's, and who waits for it all."""
        while any(books.stale for books in self.books.values()):
            for books in self.books.values():
                if books.stale:
                    books.settle(now)
        for finished, answered in self._waiters[:]:
            if finished(now):
                self._waiters.remove((finished, answered))
                answered.set()
        self._forget_devices()

    def _books_of(self, message: Hello) -> Books:
        found = self.books.get(message.device)
        if found is not None:
            return found
        reading = self._view.read(message.device)
        total = message.total if reading is None else reading.total
        if message.device == HOST:
            total = memory_of_the_machine()
        config = self._config.device_of(message.device, message.label)
        limit = config.capacity_of(message.device, total)
        device = Device(message.device, message.label or message.device, message.backend, total, limit)
        reserve = config.reserve_of(message.backend, limit)
        books = Books(device, reserve, self.post, self.journal, self._groups, self._rules, self._grace)
        if reading is not None:
            books.look(reading, self.clock())
        return self.books.setdefault(message.device, books)

    def _forget_devices(self) -> None:
        """Those of which only processes have told go with the last of them: every turn looks at each."""
        for uuid, books in list(self.books.items()):
            told = uuid != HOST and uuid not in self._config.device and books.device.used is None
            unused = told and not books.accounts.holders and books not in self._sessions.values()
            # Who waits for an operator's order asks the books.
            if unused and not self._waiters:
                del self.books[uuid]

    def _called(self, device: str | None, name: str) -> list[tuple[Books, list[Holder]]]:
        """The accounts that an operator means, by device.

        Raises:
            InvalidArgument: there are none.
        """
        where = [books for books in self.books.values() if device is None or device in books.device.names]
        if not where and device is not None:
            known = ", ".join(books.device.uuid for books in self.books.values()) or "none"
            raise InvalidArgument(f"no device '{device}'; there are {known}")
        found = [
            (books, holders)
            for books in where
            if (holders := [each for each in books.accounts.holders.values() if each.called(name)])
        ]
        if not found:
            titles = [each.title for books in where for each in books.accounts.holders.values()]
            raise InvalidArgument(f"no account or class '{name}'; there are {', '.join(titles) or 'none'}")
        return found

    def _add_rule(self, rule: LimitsConfig) -> int:
        now = self.clock()
        found = self._called(rule.device, rule.name)
        before = self._set
        self._set = with_rule(before, rule)
        self._rules[:] = [*self._config.limits, *self._set]
        try:
            changed = sum(books.enforce(now) for books, _ in found)
        except TemError:
            self._set = before
            self._rules[:] = [*self._config.limits, *before]
            for books, _ in found:
                books.enforce(now)
            raise
        self._turn(now)
        return changed
