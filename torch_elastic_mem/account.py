"""An account: whom bytes are charged to, with a priority class and limits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from torch_elastic_mem import _C
from torch_elastic_mem.device import Device
from torch_elastic_mem.elastic_range import ElasticRange
from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.priority import PriorityClass
from torch_elastic_mem.units import parse_bytes

Bytes = int | str
ReclaimFn = Callable[[int, float], object]


class Reclaimer:
    """A registered callback. `remove()` ends it; calling it twice is harmless."""

    def __init__(self, account: _C.Account, number: int) -> None:
        self._account = account
        self._number = number

    def remove(self) -> None:
        """Stops the callback from being asked. One that is running finishes."""
        self._account.remove_reclaimer(self._number)


@dataclass(frozen=True, slots=True)
class Group:
    """Demands that are granted together or not at all, as the ranks of one engine need it. Immutable.

    Attributes:
        name: the same for all members.
        members: how many there are.
        round: which of the group's demands this is; each member counts its own.

    Raises:
        InvalidArgument: no name, one too long, or fewer members than one.
    """

    name: str
    members: int
    round: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name.encode()) < 64:
            raise InvalidArgument(f"a group has a name of 1 to 63 bytes; got {self.name!r}")
        if not 1 <= self.members < 2**32 or not 0 <= self.round < 2**64:
            raise InvalidArgument(f"a group has members and rounds to count; got {self!r}")


class Reservation:
    """Bytes that are leased for growths to come. `close()` gives back what was not used."""

    def __init__(self, account: _C.Account) -> None:
        self._account = account

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> int:
        """Gives back what is left of all the account's reservations; returns the bytes."""
        return self._account.unreserve()


class Account:
    """Whom bytes are charged to, with a priority class. Made by `Arena.account`. Thread-safe.

    Attributes:
        name: unique among the open accounts of its arena.
        device: the device its memory is on.
    """

    def __init__(self, device: Device, core: _C.Account, name: str) -> None:
        self._core = core
        self._lock = threading.RLock()  # a reclaimer that goes with the account may call back
        self._allocator: _C.Allocator | None = None  # guarded by the lock
        self._open = True
        self.name = name
        self.device = device

    def __repr__(self) -> str:
        return f"<Account {self.name!r} of class {self.priority!r} on {self.device.name}>"

    def __enter__(self) -> Account:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    @property
    def priority(self) -> str:
        """The name of its priority class."""
        return self.limits.name

    @property
    def limits(self) -> PriorityClass:
        """The limits in force, which an operator may have changed; sizes in bytes."""
        return PriorityClass(**self._core.limits())

    @property
    def held(self) -> int:
        """Bytes it is charged for."""
        return self._core.held

    def set_limits(
        self,
        *,
        min: Bytes | None = None,
        low: Bytes | None = None,
        high: Bytes | None = None,
        max: Bytes | None = None,
        weight: float | None = None,
        timeout: float | None = None,
    ) -> int:
        """Changes limits, at once and for idle accounts too; what is not named stays.

        The account is brought under a lowered `max` by its own means: idle extents first, then its
        reclaimers. Under a lowered `high`, by idle extents and "evict" reclaimers only.

        Args:
            min: never reclaimed.
            low: reclaimed only when nothing else is left.
            high: above it the account trims itself and makes nobody yield; "max" for no such point.
            max: its own out-of-memory; "max" for no limit.
            weight: its share of its class.
            timeout: seconds its reclaimers may take; None: the arena's `yield_timeout`.

        Returns:
            Bytes still held above `max`: what its live blocks and its reclaimers did not give.

        Raises:
            InvalidArgument: limits that contradict each other. AdmissionError: a `min` that does not fit.
        """
        limits = limits_over(self.limits, min, low, high, max, weight)
        left = self._core.set_limits(
            limits.value,
            limits.min,
            limits.low,
            limits.high,
            limits.max,
            limits.weight,
            self.device.seconds(timeout),
        )
        return left

    def room(self) -> int:
        """Bytes that a demand would be granted now without anybody yielding."""
        return self._core.room()

    def wait(self, nbytes: int, timeout: float) -> bool:
        """Blocks, without the GIL, until `room()` reaches `nbytes`. False after `timeout` seconds."""
        return self._core.wait(parse_bytes(nbytes), self.device.seconds(timeout))

    def reserve(
        self,
        nbytes: Bytes,
        *,
        group: Group | None = None,
        timeout: float | None = None,
        rung: str = "pause",
    ) -> Reservation:
        """Leases bytes that the account's next growths are granted from, so that they wait for nobody.

        Args:
            nbytes: how much.
            group: grow together with its other members, or not at all: every member reserves with the same
                group and round, each its own bytes. It takes a broker to bring processes together.
            timeout: seconds others may take to yield, and members to come; None: the arena's `yield_timeout`.
            rung: the dearest that others are asked for, as for `ElasticKVTensor.ensure`.

        Returns:
            What to close when the growth is done, or not wanted any more.

        Raises:
            OutOfMemory: it cannot be had, or another member's part cannot; nobody has anything then.
            InvalidArgument: no such rung.
        """
        name, members, turn = ("", 1, 0) if group is None else (group.name, group.members, group.round)
        self._core.reserve(parse_bytes(nbytes), self.device.seconds(timeout), rung, name, members, turn)
        return Reservation(self._core)

    def note_blocks(self, in_use: int, cached: int, free: int, parked: int) -> None:
        """Says what is in an engine's blocks, for people to look at: `tem top` shows it under a broker.

        Nothing is made of it. A broker is told at most ten times a second, whatever is said here.

        Args:
            in_use: blocks that requests hold.
            cached: those that no request holds, in which a prefix is kept.
            free: those with memory, in which nothing is.
            parked: those without memory.
        """
        self._core.note_blocks(in_use, cached, free, parked)

    def trim(self) -> int:
        """Gives back every idle extent, kept ones included. Returns the bytes.

        Raises:
            DriverError: the driver refused to unmap one; the rest has been given back.
        """
        return self._core.trim()

    def on_reclaim(self, fn: ReclaimFn, rung: str = "evict") -> Reclaimer:
        """Registers a callback that frees memory when a demand needs this account to yield.

        `fn(nbytes, timeout)` runs on the demanding thread, with the GIL and no lock of this package. It may
        block up to `timeout` seconds, for instance until the tenant's own thread has reached a safe point.
        What it freed is read from the ledger, not from its answer. What it raises is reported to
        `sys.unraisablehook`, since it is another account's demand that runs it. Several demands may call it
        at once.

        Args:
            fn: the callback.
            rung: what it costs the tenant, cheapest first: "evict", "spill", "shrink" or "pause". Idle
                extents are taken without asking.

        Raises:
            InvalidArgument: an unknown rung, or a callback that cannot be called.
        """
        if not callable(fn):
            raise InvalidArgument(f"a reclaimer is called as fn(nbytes, timeout); got {fn!r}")
        return Reclaimer(self._core, self._core.add_reclaimer(rung, fn))

    @contextmanager
    def allocations(self) -> Iterator[None]:
        """Charges this thread's torch allocations to the account within the block.

        On the host backend CPU tensors come from the arena, through an allocator that torch is given on
        first use. On the CUDA backend `torch_allocator` has to be torch's current allocator. Tensors may
        outlive the block, but not the account. Out of memory raises `torch.OutOfMemoryError`, but a
        RuntimeError on CUDA through torch's plain C hooks: `is_out_of_memory` knows both.

        Raises:
            TemError: the torch extension was not built (host backend).
        """
        if self.device.backend == "host":
            from torch_elastic_mem.cpu_allocator import install_cpu_allocator

            install_cpu_allocator()
        previous = _C.exchange_scope(self.allocator())
        try:
            yield
        finally:
            _C.exchange_scope(previous)

    def allocator(self) -> _C.Allocator:
        """The account's malloc, made on first use."""
        with self._lock:
            if self._allocator is None:
                self._allocator = _C.Allocator(self._core, self.name)
            return self._allocator

    def range(self, nbytes: Bytes, *, keep: Bytes = 0, extent: Bytes = 0) -> ElasticRange:
        """A raw range of `nbytes` addresses that grows and shrinks at its end.

        Args:
            nbytes: addresses to reserve; rounded up to the device's granularity.
            keep: idle bytes that stay mapped after a shrink until somebody needs them.
            extent: the size that no extent exceeds, a power of two from the granularity to 64 MiB; 0: the
                arena chooses.

        Raises:
            InvalidArgument: zero bytes, or an extent size that cannot be.
        """
        return ElasticRange(
            self._core,
            self.name,
            parse_bytes(nbytes),
            parse_bytes(keep),
            parse_bytes(extent),
            self.device.granularity,
            self.device.seconds,
        )

    def close(self) -> None:
        """Closes the account. Harmless the second time.

        Raises:
            InUseError: tensors, ranges or allocations still live in it; it stays open.
        """
        with self._lock:
            if not self._open:
                return
            if self._allocator is not None:
                self._allocator.close()
                self._allocator = None
            self._core.close()
            self._open = False


def limits_over(
    base: PriorityClass,
    min: Bytes | None,
    low: Bytes | None,
    high: Bytes | None,
    max: Bytes | None,
    weight: float | None,
) -> PriorityClass:
    """The limits of a class with those that are given put over them.

    Sizes are an int or a text; `high` and `max` may be "max", cgroup v2's word for no limit.
    """

    def upper(given: Bytes | None, before: int | None) -> int | None:
        if given is None:
            return before
        return None if given == "max" else parse_bytes(given)

    return PriorityClass(
        base.name,
        base.value,
        min=base.min if min is None else parse_bytes(min),
        low=base.low if low is None else parse_bytes(low),
        high=upper(high, base.high),
        max=upper(max, base.max),
        weight=base.weight if weight is None else weight,
    )
