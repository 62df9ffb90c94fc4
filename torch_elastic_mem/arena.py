"""The arena: one pool of a device's memory, and the accounts that share it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from torch_elastic_mem import _C
from torch_elastic_mem.account import Account, Bytes, limits_over
from torch_elastic_mem.broker import paths
from torch_elastic_mem.device import Device, device_of
from torch_elastic_mem.errors import BrokerError, InvalidArgument
from torch_elastic_mem.priority import PriorityClass, priority
from torch_elastic_mem.snapshot import AccountSnapshot, Snapshot, YieldRecord
from torch_elastic_mem.units import parse_bytes

# Left free on a GPU for what lives outside the arena (the CUDA context, cuBLAS, other processes' first
# steps): a device with nothing free makes the driver's next allocation wait for milliseconds. Between the
# marks lie warm extents.
CUDA_RESERVE = (256 << 20, 1280 << 20)
LIBCUDA = "libcuda.so.1"


class Arena:
    """A device's memory, shared between accounts. Thread-safe.

    Addresses are reserved once and never move; physical memory comes and goes beneath them. One arena a CUDA
    device and process may be open.

    Args:
        device: "host" (memory of this machine, strict as the driver), "cuda" or "cuda:1".
        capacity: bytes to share out. On CUDA the default is what is free on the device now. The host backend
            needs one.
        reserve: (low, high). `low` bytes are never leased and stay free on the device; up to `high`, free
            bytes are kept as warm extents that a growth maps without a create, refilled by the arena's
            thread. The default is (256 MiB, 1.25 GiB) on CUDA, less on small capacities, and (0, 0) on the
            host.
        yield_timeout: seconds a demand waits for others to yield, where the call names no timeout.
        broker: whom it gets its leases from, so that processes yield to each other: the path of a broker's
            socket, or None for no broker. "auto" is what TEM_BROKER names (0: none), else the broker that
            runs in the default place, else none. A broker shares out the device: `reserve` is its own then,
            and `capacity` only says how much the host backend may have.

    Attributes:
        broker: the path of the broker's socket, or None for an arena that stands alone.
        backend: "host" or "cuda".
        device: the device as torch names it: "cpu" or "cuda:0".
        uuid: the device's UUID, the same in every process.
        granularity: bytes; memory comes in multiples of it.

    Raises:
        InvalidArgument: an unknown device, sizes that cannot be right or are larger than the device.
        DriverMissing: no CUDA driver, one too old, no such device, or one without virtual memory management.
        InUseError: an arena is open on this CUDA device.
        BrokerError: the broker that was named does not answer, or does not want this process.
    """

    def __init__(
        self,
        device: str = "cuda",
        *,
        capacity: Bytes | None = None,
        reserve: tuple[Bytes, Bytes] | None = None,
        yield_timeout: float = 1.0,
        broker: str | None = "auto",
    ) -> None:
        kind, index = device_of(device)
        wanted = None if capacity is None else parse_bytes(capacity)
        if kind == "host":
            backend = _C.host_backend(_machine() if wanted is None else wanted)
        else:
            backend = _C.cuda_backend(index, LIBCUDA)
            wanted = backend.memory_info()[0] if wanted is None else wanted
        name = "cpu" if kind == "host" else f"cuda:{index}"
        self._device = Device(kind, name, index, backend.granularity, yield_timeout)
        link = _connect(broker, kind, backend)
        if link is not None:
            if reserve is not None:
                raise InvalidArgument("the reserve is the broker's; set it where the broker is configured")
            self._core = _C.Arena.under(backend, link)
        elif wanted is None:
            raise InvalidArgument(
                "the host backend needs a capacity: how much of this machine's memory to share"
            )
        else:
            self._core = _C.Arena(backend, wanted, *_reserve(reserve, kind, wanted))
        self._backend = backend
        self.broker = None if link is None else link.path
        self.backend = kind
        self.device = name
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
        """Bytes that accounts may hold together, reserve included; under a broker, at most."""
        capacity: int = self._core.state()["capacity"]
        return capacity

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
            priority: the name of a built-in class, or a class of your own; limits not given here are the
                class's.
            min: never reclaimed.
            low: reclaimed only when nothing else is left.
            high: above it the account trims itself and makes nobody yield.
            max: its own out-of-memory.
            weight: its share of its class.

        Raises:
            InvalidArgument: an unknown class, a name in use, limits that contradict each other.
            AdmissionError: a `min` that does not fit beside those promised.
            BrokerError: the broker is gone, or does not permit this class or `min`.
        """
        if not isinstance(name, str) or not name:
            raise InvalidArgument(f"an account needs a name, a text; got {name!r}")
        limits = limits_over(_class(priority), min, low, high, max, weight)
        core = self._core.open_account(
            name, limits.name, limits.value, limits.min, limits.low, limits.high, limits.max, limits.weight
        )
        return Account(self._device, core, name)

    def set_capacity(self, capacity: Bytes, timeout: float | None = None) -> int:
        """Changes what may be shared out. Below what is leased, accounts yield, lowest class first.

        Returns:
            Bytes still leased above it when nobody had more to give; nothing is granted until they have come
            back.

        Raises:
            InvalidArgument: zero, or more than the device has. AdmissionError: the `min`s no longer fit.
        """
        state = self._core.state()
        return self._core.set_capacity(
            parse_bytes(capacity), state["reserve_low"], state["reserve_high"], self._device.seconds(timeout)
        )

    def set_reserve(self, low: Bytes, high: Bytes, timeout: float | None = None) -> int:
        """Changes the reserve's marks; returns what set_capacity does, above capacity less `low`."""
        return self._core.set_capacity(self.capacity, *_marks(low, high), self._device.seconds(timeout))

    def collect(self) -> int:
        """Unmaps what is idle, not kept, and behind a passed fence, as the arena does by itself.

        Returns:
            The bytes.

        Raises:
            DriverError: the driver refused to unmap an extent; the rest has been given back.
        """
        return self._core.collect()

    def refill(self) -> int:
        """Fills the warm reserve up to its upper mark, as the arena does by itself; returns the bytes."""
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
            broker=self.broker,
            accounts=[AccountSnapshot(**account) for account in accounts],
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


def _machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _broker(given: str | None) -> tuple[str | None, bool]:
    """The socket to connect to, and whether it must answer."""
    if given is None:
        return None, False
    if given != "auto":
        return os.fspath(given), True
    found = paths.tenants_socket(os.environ)
    if found is None:
        return None, False
    named = paths.BROKER in os.environ
    return (str(found), named) if named or found.is_socket() else (None, False)


def _connect(broker: str | None, kind: str, backend: _C.Backend) -> _C.Broker | None:
    """The broker that is to serve a device. None if the arena is to stand alone.

    Raises:
        BrokerError: it does not answer, or says no.
    """
    socket, required = _broker(broker)
    if socket is None:
        return None
    device = "HOST" if kind == "host" else backend.uuid
    total = backend.memory_info()[1]
    process = os.environ.get("TEM_NAME") or Path(sys.argv[0] if sys.argv else "").name or "python"
    try:
        return _C.Broker(
            socket, device, kind, backend.device_name, process, total, backend.granularity, timeout=2.0
        )
    except BrokerError as error:
        # The socket of a broker that has died stays in its place.
        if required or "no broker listens there" not in str(error):
            raise
        return None
