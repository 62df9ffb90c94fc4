"""A broker's state and yields as metrics for Prometheus, in base units; `docs/operating.md` lists them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from torch_elastic_mem.broker.state import AccountState, DeviceState, Event, MachineState

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

# Upper edges in seconds: trims take fractions of a millisecond, a pause may take seconds.
BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

Labels = tuple[str, ...]
_ACCOUNT = ("device", "account", "process", "pid", "class")


class YieldDurations:
    """How long yields took, by device and rung. For one thread at a time.

    Events that the broker has forgotten before they were looked at are not counted: at least one look is
    needed for each 65,536 of them.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    @property
    def seen(self) -> int:
        """The number of the last event that was counted."""
        return self._seen

    def add(self, events: Iterable[Event]) -> None:
        """Counts events that come after those seen; others are passed over."""
        for event in events:
            if event.seq <= self._seen:
                continue
            self._seen = event.seq
            if event.kind == "yield":
                labels, seconds = (event.device, event.rung), event.duration_ns / 1e9
                counts = self._counts.setdefault(labels, [0] * (len(BUCKETS) + 1))
                counts[bisect_left(BUCKETS, seconds)] += 1
                self._sums[labels] = self._sums.get(labels, 0.0) + seconds

    def family(self) -> Metric:
        """The histogram so far."""
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(
            "tem_yield_duration_seconds",
            "Time from an ask to its last answer, by the rung that gave.",
            labels=("device", "rung"),
        )
        for labels, counts in self._counts.items():
            total, buckets = 0, []
            for edge, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
                total += count
                buckets.append((edge, float(total)))
            family.add_metric(labels, buckets, self._sums[labels])
        return family


class Collector:
    """A collector of prometheus_client over what `read` tells. Scrapes come one at a time.

    Args:
        read: called at each scrape with the number of an event; returns the state and the events after that.
    """

    def __init__(self, read: Callable[[int], tuple[MachineState, list[Event]]]) -> None:
        self._read = read
        self._durations = YieldDurations()

    def collect(self) -> Iterator[Metric]:
        """All metrics of one moment."""
        state, events = self._read(self._durations.seen)
        self._durations.add(events)
        yield from families(state)
        yield self._durations.family()

    def describe(self) -> list[Metric]:
        """Nothing: so that a registry need not read the broker to register this."""
        return []


def families(state: MachineState) -> Iterator[Metric]:
    """The metrics of a state."""
    yield from _broker(state)
    yield from _devices(state)
    yield from _accounts(state)


def _broker(state: MachineState) -> Iterator[Metric]:
    yield _gauge("tem_build_info", "The broker's version; always 1.", ("version",), {(state.version,): 1})
    yield _gauge("tem_uptime_seconds", "Since the broker's start.", (), {(): state.uptime})
    yield _gauge("tem_clients", "Connections of tenants.", (), {(): state.clients})
    yield _counter("tem_demands_granted", "Demands that were granted.", (), {(): state.grants})
    yield _counter("tem_demands_denied", "Demands that were refused.", (), {(): state.denials})
    yield _counter("tem_asks", "Asks sent to accounts that had to give.", (), {(): state.asks})


def _devices(state: MachineState) -> Iterator[Metric]:
    kinds: dict[Labels, float] = {}
    info: dict[Labels, float] = {}
    pressure: dict[Labels, float] = {}
    debtors: dict[Labels, float] = {}
    for device in state.devices:
        info[device.uuid, device.label, device.backend] = 1
        debtors[(device.uuid,)] = sum(account.state == "debtor" for account in device.accounts)
        kinds |= {(device.uuid, kind): size for kind, size in _kinds(device).items()}
        pressure |= {(device.uuid, name): share for name, share in device.pressure.items()}
    yield _gauge("tem_device_info", "A device by name; always 1.", ("device", "label", "backend"), info)
    yield _gauge("tem_device_bytes", "A device's memory, by what it is.", ("device", "kind"), kinds)
    yield _gauge(
        "tem_device_pressure_ratio",
        "The part of the last 10 s in which a demand of the class waited.",
        ("device", "class"),
        pressure,
    )
    yield _gauge("tem_debtors", "Accounts whose answer to an ask is late.", ("device",), debtors)


def _kinds(device: DeviceState) -> dict[str, int]:
    names = ("total", "capacity", "leased", "free", "outside", "reserve_low", "reserve_high", "queued")
    return {name: getattr(device, name) for name in names}


def _accounts(state: MachineState) -> Iterator[Metric]:
    gauges = {
        "lease": "Granted to the account.",
        "held": "In use by the account, as it last reported.",
        "idle": "The part of what it holds in which nothing lives.",
        "waiting": "Of its demands that are queued.",
    }
    for field, text in gauges.items():
        yield _gauge(f"tem_account_{field}_bytes", text, _ACCOUNT, _of_accounts(state, field))
    yield _gauge(
        "tem_account_blocks",
        "Blocks of an engine, by what is in them.",
        (*_ACCOUNT, "state"),
        _blocks(state),
    )
    counters = {
        "tem_account_given_bytes": ("given", "Yielded since the account was opened."),
        "tem_account_taken_bytes": ("taken", "Granted since the account was opened."),
        "tem_account_denied": ("denied", "Demands of the account that were refused."),
    }
    for name, (field, text) in counters.items():
        yield _counter(name, text, _ACCOUNT, _of_accounts(state, field))


def _labelled(state: MachineState) -> Iterator[tuple[Labels, AccountState]]:
    """The accounts. What a process calls by one name, in several arenas, has the same labels."""
    for device in state.devices:
        for account in device.accounts:
            yield (device.uuid, account.name, account.process, str(account.pid), account.priority), account


def _of_accounts(state: MachineState, field: str) -> dict[Labels, float]:
    """A field by account, those of the same labels added up."""
    values: dict[Labels, float] = {}
    for labels, account in _labelled(state):
        values[labels] = values.get(labels, 0) + getattr(account, field)
    return values


def _blocks(state: MachineState) -> dict[Labels, float]:
    values: dict[Labels, float] = {}
    for labels, account in _labelled(state):
        for kind, count in msgspec.to_builtins(account.blocks or {}).items():
            values[*labels, kind] = values.get((*labels, kind), 0) + count
    return values


def _gauge(name: str, text: str, labels: Labels, values: dict[Labels, float]) -> GaugeMetricFamily:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text, labels=labels)
    for given, value in values.items():
        family.add_metric(given, value)
    return family


def _counter(name: str, text: str, labels: Labels, values: dict[Labels, float]) -> CounterMetricFamily:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=labels)
    for given, value in values.items():
        family.add_metric(given, value)
    return family
