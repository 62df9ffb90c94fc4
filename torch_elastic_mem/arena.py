"""The arena: one pool of a device's memory, and the accounts that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch_elastic_mem import _C
from torch_elastic_mem.elastic_range import ElasticRange
from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.priority import PriorityClass, priority
from torch_elastic_mem.snapshot import AccountSnapshot, Snapshot, YieldRecord
from torch_elastic_mem.units import parse_bytes

Bytes = int | str
ReclaimFn = Callable[[int, float], object]

# Left free on a GPU for what lives outside the arena (the CUDA context, cuBLAS, other processes' first steps): a device
# with nothing free makes the driver's next allocation wait 8 ms. Between the marks lie warm extents.
CUDA_RESERVE = (256 << 20, 1280 << 20)
LIBCUDA = "libcuda.so.1"


def _device_of(device: str) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    if device in ("host", "cpu"):
        return "host", 0
    if kind == "cuda" and (not index or index.isdecimal()):
        return "cuda", int(index or 0)
    raise InvalidArgument(f"unknown device {device!r}: use 'host', 'cuda' or 'cuda:N'")


class Reclaimer:
    """A registered callback. `remove()` ends it; calling it twice is harmless."""

    def __init__(self, account: _C.Account, number: int) -> None:
        self._account = account
        self._number = number

    def remove(self) -> None:
        """Stops the callback from being asked. One that is running finishes."""
        self._account.remove_reclaimer(self._number)


class Account:
    """Whom bytes are charged to, with a priority class. Made by `Arena.account`. Thread-safe."""

    def __init__(self, arena: Arena, core: _C.Account, name: str, limits: PriorityClass) -> None:
        self._arena = arena
        self._core = core
        self._limits = limits
        self._allocator: _C.Allocator | None = None
        self._open = True
        self.name = name

    def __repr__(self) -> str:
        return f"<Account {self.name!r} of class {self.priority!r} on {self._arena.device}>"

    def __enter__(self) -> Account:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def arena(self) -> Arena:
        """The arena it belongs to."""
        return self._arena

    @property
    def priority(self) -> str:
        """The name of its priority class."""
        return self._limits.name

    @property
    def limits(self) -> PriorityClass:
        """The limits in force; sizes in bytes."""
        return self._limits

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
        """Changes limits; what is not named stays. A lowered one takes effect before this returns, also when idle.

        The account is brought under a lowered `max` by its own means: idle extents first, then its reclaimers. Under a
        lowered `high`, by idle extents and "evict" reclaimers only.

        Args:
            min: never reclaimed.
            low: reclaimed only when nothing else is left.
            high: above it the account trims itself and makes nobody yield.
            max: its own out-of-memory.
            weight: its share of its class.
            timeout: seconds its reclaimers may take; None: the arena's `yield_timeout`.

        Returns:
            Bytes still held above `max`: what its live blocks and its reclaimers did not give.

        Raises:
            InvalidArgument: limits that contradict each other. AdmissionError: a `min` that does not fit.
        """
        limits = _limits(self._limits, min, low, high, max, weight)
        left = self._core.set_limits(
            limits.value,
            limits.min,
            limits.low,
            limits.high,
            limits.max,
            limits.weight,
            self._arena.seconds(timeout),
        )
        self._limits = limits
        return left

    def room(self) -> int:
        """Bytes that a demand would be granted now without anybody yielding."""
        return self._core.room()

    def wait(self, nbytes: int, timeout: float) -> bool:
        """Blocks, without the GIL, until `room()` reaches `nbytes`. False after `timeout` seconds."""
        return self._core.wait(parse_bytes(nbytes), timeout)

    def trim(self) -> int:
        """Gives back every idle extent, kept ones included. Returns the bytes.

        Raises:
            DriverError: the driver refused to unmap one; the rest has been given back.
        """
        return self._core.trim()

    def on_reclaim(self, fn: ReclaimFn, rung: str = "evict") -> Reclaimer:
        """Registers a callback that frees memory when a demand needs this account to yield.

        `fn(nbytes, timeout)` runs on the demanding thread, with the GIL and no lock of this package. It may block up to
        `timeout` seconds, for instance until the tenant's own thread has reached a safe point. What it freed is read
        from the ledger, not from its answer. What it raises is reported to `sys.unraisablehook`, since it is another
        account's demand that runs it. Several demands may call it at once.

        Args:
            fn: the callback.
            rung: what it costs the tenant, cheapest first: "evict", "spill", "shrink" or "pause". Idle extents are
                taken without asking.

        Raises:
            InvalidArgument: an unknown rung, or a callback that cannot be called.
        """
        if not callable(fn):
            raise InvalidArgument(f"a reclaimer is called as fn(nbytes, timeout); got {fn!r}")
        return Reclaimer(self._core, self._core.add_reclaimer(rung, fn))

    @contextmanager
    def allocations(self) -> Iterator[None]:
        """Charges this thread's torch allocations to the account within the block.

        On the host backend CPU tensors come from the arena, through an allocator that torch is given on first use. On
        the CUDA backend `torch_allocator` has to be torch's current allocator. Tensors may outlive the block, but not
        the account. Out of memory raises `torch.OutOfMemoryError` on the host and, through the plain C hooks, a
        RuntimeError on CUDA: `is_out_of_memory` knows both.

        Raises:
            TemError: the torch extension was not built (host backend).
        """
        if self._arena.backend == "host":
            from torch_elastic_mem.torch_hooks import install_cpu_allocator

            install_cpu_allocator()
        previous = _C.exchange_scope(self.allocator())
        try:
            yield
        finally:
            _C.exchange_scope(previous)

    def allocator(self) -> _C.Allocator:
        """The account's malloc, made on first use."""
        if self._allocator is None:
            self._allocator = _C.Allocator(self._core, self.name)
        return self._allocator

    def range(self, nbytes: Bytes, *, keep: Bytes = 0) -> ElasticRange:
        """A raw range of `nbytes` addresses that grows and shrinks at its end.

        Args:
            nbytes: addresses to reserve; rounded up to the arena's granularity.
            keep: idle bytes that stay mapped after a shrink until somebody needs them.
        """
        return ElasticRange(
            self._core, self.name, parse_bytes(nbytes), parse_bytes(keep), self._arena.granularity
        )

    def close(self) -> None:
        """Closes the account. Harmless the second time.

        Raises:
            InUseError: tensors, ranges or allocations still live in it; it stays open.
        """
        if not self._open:
            return
        if self._allocator is not None:
            self._allocator.close()
            self._allocator = None
        self._core.close()
        self._open = False


class Arena:
    """A device's memory, shared between accounts. Thread-safe.

    Addresses are reserved once and never move; physical memory comes and goes beneath them. One arena a CUDA device and
    process may be open.

    Args:
        device: "host" (memory of this machine, strict as the driver), "cuda" or "cuda:1".
        capacity: bytes to share out. On CUDA the default is what is free on the device now. The host backend needs one.
        reserve: (low, high). `low` bytes are never leased and stay free on the device; up to `high`, free bytes are kept
            as warm extents that a growth maps without a create, refilled by the arena's thread. The default is
            (256 MiB, 1.25 GiB) on CUDA, less on small capacities, and (0, 0) on the host.
        yield_timeout: seconds a demand waits for others to yield, where the call names no timeout.

    Raises:
        InvalidArgument: an unknown device, sizes that cannot be right or are larger than the device.
        DriverMissing: no CUDA driver, one too old, no such device, or one without virtual memory management.
        InUseError: an arena is open on this CUDA device.
    """

    def __init__(
        self,
        device: str = "cuda",
        *,
        capacity: Bytes | None = None,
        reserve: tuple[Bytes, Bytes] | None = None,
        yield_timeout: float = 1.0,
    ) -> None:
        kind, index = _device_of(device)
        if yield_timeout < 0:
            raise InvalidArgument(f"yield_timeout is in seconds and not negative; got {yield_timeout}")
        wanted = None if capacity is None else parse_bytes(capacity)
        if kind == "host":
            if wanted is None:
                raise InvalidArgument(
                    "the host backend needs a capacity: how much of this machine's memory to share"
                )
            backend = _C.host_backend(wanted)
        else:
            backend = _C.cuda_backend(index, LIBCUDA)
            wanted = backend.memory_info()[0] if wanted is None else wanted
        low, high = _reserve(reserve, kind, wanted)
        self._core = _C.Arena(backend, wanted, low, high)
        self._backend = backend
        self._classes: dict[str, str] = {}
        self.yield_timeout = yield_timeout
        self.backend = kind
        self.device = "cpu" if kind == "host" else f"cuda:{index}"
        self.uuid = backend.uuid
        self.granularity = backend.granularity

    def __repr__(self) -> str:
        return f"<Arena on {self.device} ({self._backend.device_name})>"

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    @property
    def capacity(self) -> int:
        """Bytes that accounts may hold together, reserve included."""
        capacity: int = self._core.state()["capacity"]
        return capacity

    def seconds(self, timeout: float | None) -> float:
        """A timeout in seconds, the arena's own for None.

        Raises:
            InvalidArgument: a negative one.
        """
        if timeout is None:
            return self.yield_timeout
        if not timeout >= 0:
            raise InvalidArgument(f"a timeout is in seconds and not negative; got {timeout}")
        return min(timeout, 1e9)

    def account(
        self,
        name: str,
        priority: str | PriorityClass = "training",
        *,
        min: Bytes | None = None,
        low: Bytes | None = None,
        high: Bytes | None = None,
        max: Bytes | None = None,
        weight: float | None = None,
    ) -> Account:
        """Opens an account.

        Args:
            name: unique among the arena's open accounts.
            priority: the name of a built-in class, or a class of your own; limits not given here are the class's.
            min: never reclaimed.
            low: reclaimed only when nothing else is left.
            high: above it the account trims itself and makes nobody yield.
            max: its own out-of-memory.
            weight: its share of its class.

        Raises:
            InvalidArgument: an unknown class, a name in use, limits that contradict each other.
            AdmissionError: a `min` that does not fit beside those promised.
        """
        if not isinstance(name, str) or not name:
            raise InvalidArgument(f"an account needs a name, a text; got {name!r}")
        limits = _limits(_class(priority), min, low, high, max, weight)
        core = self._core.open_account(
            name, limits.value, limits.min, limits.low, limits.high, limits.max, limits.weight
        )
        self._classes[name] = limits.name  # stays after a close: a snapshot may be under way
        return Account(self, core, name, limits)

    def set_capacity(self, capacity: Bytes, timeout: float | None = None) -> int:
        """Changes what may be shared out. If it falls below what is leased, accounts yield, lowest class first.

        Returns:
            Bytes still leased above it when nobody had more to give; nothing is granted until they have come back.

        Raises:
            InvalidArgument: zero, or more than the device has. AdmissionError: the `min`s no longer fit.
        """
        state = self._core.state()
        return self._core.set_capacity(
            parse_bytes(capacity), state["reserve_low"], state["reserve_high"], self.seconds(timeout)
        )

    def set_reserve(self, low: Bytes, high: Bytes, timeout: float | None = None) -> int:
        """Changes the reserve's marks. Returns bytes still leased above capacity less `low`, as set_capacity does."""
        return self._core.set_capacity(self.capacity, *_marks(low, high), self.seconds(timeout))

    def collect(self) -> int:
        """Unmaps what is idle, not kept, and behind a passed fence. Returns the bytes. The arena does so by itself.

        Raises:
            DriverError: the driver refused to unmap an extent; the rest has been given back.
        """
        return self._core.collect()

    def refill(self) -> int:
        """Fills the warm reserve up to its upper mark now. Returns the bytes created. The arena does so by itself."""
        return self._core.refill()

    def snapshot(self) -> Snapshot:
        """The arena at this moment."""
        state: dict[str, Any] = self._core.state()
        accounts = state.pop("accounts")
        limbo = sum(account.pop("pending") for account in accounts)
        return Snapshot(
            device=self.device,
            uuid=self.uuid,
            limbo=limbo,
            accounts=[
                AccountSnapshot(priority=self._classes[account["name"]], **account) for account in accounts
            ],
            **state,
        )

    def yields(self, since: int = 0) -> list[YieldRecord]:
        """The last yields, oldest first, with numbers above `since`. The arena keeps 4,096."""
        return [YieldRecord(**record) for record in self._core.yields(since)]

    def close(self) -> None:
        """Gives everything back to the device. Harmless the second time.

        Raises:
            InUseError: accounts are open; it stays open.
        """
        self._core.close()


def _class(given: str | PriorityClass) -> PriorityClass:
    if isinstance(given, PriorityClass):
        return given
    if isinstance(given, str):
        return priority(given)
    raise InvalidArgument(f"a priority is a class's name or a PriorityClass; got {given!r}")


def _limits(
    base: PriorityClass,
    min: Bytes | None,
    low: Bytes | None,
    high: Bytes | None,
    max: Bytes | None,
    weight: float | None,
) -> PriorityClass:
    return PriorityClass(
        base.name,
        base.value,
        min=base.min if min is None else parse_bytes(min),
        low=base.low if low is None else parse_bytes(low),
        high=base.high if high is None else parse_bytes(high),
        max=base.max if max is None else parse_bytes(max),
        weight=base.weight if weight is None else weight,
    )


def _marks(low: Bytes, high: Bytes) -> tuple[int, int]:
    return parse_bytes(low), parse_bytes(high)


def _reserve(reserve: tuple[Bytes, Bytes] | None, kind: str, capacity: int) -> tuple[int, int]:
    if reserve is not None:
        return _marks(*reserve)
    if kind == "host":
        return 0, 0
    # A sixteenth of a small capacity, so that the default never takes most of what was asked for.
    low, high = CUDA_RESERVE
    return min(low, capacity // 64), min(high, capacity // 16)
