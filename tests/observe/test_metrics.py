from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import torch_elastic_mem as tem
from tests.broker.controlled import CannedBroker
from tests.broker.machine import GPU, GiB, account, device, machine, serving, yielded
from torch_elastic_mem.broker.state import Event, MachineState
from torch_elastic_mem.observe import exporter
from torch_elastic_mem.observe.exporter import serve_metrics
from torch_elastic_mem.observe.metrics import BUCKETS, Collector, YieldDurations

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(text: str) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, f"twice: {key}"
            samples[key] = sample.value
    return samples


def exported(state: MachineState, *events: Event) -> Samples:
    registry = CollectorRegistry()
    registry.register(Collector(lambda since: (state, [event for event in events if event.seq > since])))
    return scraped(generate_latest(registry).decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_a_device_is_told_in_bytes_by_its_uuid() -> None:
    samples = exported(machine())
    told = {
        dict(labels)["kind"]: size / GiB
        for (name, labels), size in samples.items()
        if name == "tem_device_bytes" and dict(labels)["device"] == GPU
    }
    assert told == {
        "total": 80,
        "capacity": 78,
        "leased": 60,
        "free": 17,
        "outside": 1,
        "reserve_low": 1,
        "reserve_high": 2,
        "queued": 0,
    }
    assert value(samples, "tem_device_pressure_ratio", device=GPU, **{"class": "serving"}) == 0.25


def test_an_account_is_told_with_what_it_gave_and_took() -> None:
    samples = exported(machine())
    labels = {
        "device": GPU,
        "account": "fine-tune",
        "process": "train.py",
        "pid": "4711",
        "class": "training",
    }
    for name, size in {
        "tem_account_lease_bytes": 40 * GiB,
        "tem_account_held_bytes": 38 * GiB,
        "tem_account_idle_bytes": 2 * GiB,
        "tem_account_given_bytes_total": 12 * GiB,
        "tem_account_taken_bytes_total": 52 * GiB,
        "tem_account_denied_total": 1,
    }.items():
        assert value(samples, name, **labels) == size


def test_an_engine_is_told_with_what_is_in_its_blocks() -> None:
    told = {
        dict(labels)["state"]: count
        for (name, labels), count in exported(machine()).items()
        if name == "tem_account_blocks" and dict(labels)["account"] == "chat"
    }
    assert told == {"in_use": 500, "cached": 1500, "free": 48, "parked": 8191}
    assert not any(name == "tem_account_blocks" for name, _ in exported(machine(device(account()))))


def test_the_broker_is_told_too() -> None:
    samples = exported(machine(device(account(state="debtor"), serving())))
    assert value(samples, "tem_build_info", version="0.1.0") == 1
    assert value(samples, "tem_clients") == 2
    assert value(samples, "tem_demands_granted_total") == 17
    assert value(samples, "tem_demands_denied_total") == 1
    assert value(samples, "tem_asks_total") == 4
    assert value(samples, "tem_debtors", device=GPU) == 1


def test_accounts_of_one_name_in_one_process_are_one_series() -> None:
    # Prometheus refuses a scrape that has a series twice.
    samples = exported(machine(device(account(), account(lease=GiB))))
    found = [size for (name, _), size in samples.items() if name == "tem_account_lease_bytes"]
    assert found == [41 * GiB]


def test_names_of_tenants_cannot_break_a_scrape() -> None:
    name = 'a"b\\c\nd{}=,\u2028é'
    samples = exported(machine(device(account(name))))
    assert any(dict(labels).get("account") == name for _, labels in samples)


def test_yields_are_counted_once_however_often_they_are_seen() -> None:
    durations = YieldDurations()
    events = [yielded(seq, duration_ns=seq * 1_000_000) for seq in range(1, 21)]
    durations.add(events[:10])
    durations.add(events)
    (family,) = [durations.family()]
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in family.samples
        if sample.labels["rung"] == "trim"
    }
    assert samples["tem_yield_duration_seconds_count", None] == 20
    assert samples["tem_yield_duration_seconds_sum", None] == pytest.approx(0.210)
    # An edge belongs to the bucket below it.
    assert samples["tem_yield_duration_seconds_bucket", "0.01"] == 10
    assert samples["tem_yield_duration_seconds_bucket", "0.001"] == 1
    assert samples["tem_yield_duration_seconds_bucket", "+Inf"] == 20
    assert list(BUCKETS) == sorted(BUCKETS)


def test_only_yields_have_durations() -> None:
    samples = exported(machine(), yielded(1), yielded(2, kind="grant", rung=""))
    assert value(samples, "tem_yield_duration_seconds_count", device=GPU, rung="trim") == 1
    assert not [name for name, labels in samples if dict(labels).get("rung") == ""]


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_metrics_are_served_and_the_broker_is_read_on_its_own_thread(loop: asyncio.AbstractEventLoop) -> None:
    threads = set()

    class Watched(CannedBroker):
        def state(self) -> MachineState:
            threads.add(threading.get_ident())
            return super().state()

    ran = asyncio.run_coroutine_threadsafe(asyncio.sleep(0, threading.get_ident), loop).result(5)
    port = free_port()
    close = serve_metrics(Watched(), loop, port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            samples = scraped(answer.read().decode())
        assert value(samples, "tem_clients") == 2
        on_loop: list[int] = []
        loop.call_soon_threadsafe(lambda: on_loop.append(ran()))
        while not on_loop:
            time.sleep(0.01)
        assert threads == set(on_loop)
        with pytest.raises(tem.InvalidArgument, match="configure another port"):
            serve_metrics(Watched(), loop, port)
    finally:
        close()


def test_a_scrape_of_a_busy_broker_fails_and_the_next_succeeds(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_READ_SECONDS", 0.1)
    port = free_port()
    close = serve_metrics(CannedBroker(), loop, port)
    try:
        busy = threading.Event()
        loop.call_soon_threadsafe(busy.wait)
        with pytest.raises((urllib.error.HTTPError, OSError)):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)
        busy.set()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"tem_clients 2.0" in answer.read()
    finally:
        busy.set()
        close()
