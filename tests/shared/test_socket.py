"""The shares socket against whoever speaks to it: what one does hurts that one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torch_elastic_mem as tem
from tests.broker.tenant import Tenant
from tests.shared.processes import Broker, MiB, until

EXTENT = 2 * MiB


class Raw:
    """A connection that says what it is told to."""

    def __init__(self, broker: Broker) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        self.socket.connect(str(broker.shares))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, message: Any, fds: list[int] | None = None) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        socket.send_fds(self.socket, [data], fds or [])

    def answer(self) -> Any:
        """None at the end of the connection."""
        with contextlib.suppress(ConnectionResetError):
            data, fds, _, _ = socket.recv_fds(self.socket, 4096, 253)
            for each in fds:
                os.close(each)
            return json.loads(data) | {"fds": len(fds)} if data else None
        return None

    def ask(self, message: Any, fds: list[int] | None = None) -> Any:
        self.send(message, fds)
        return self.answer()


@pytest.fixture
def pipe() -> Iterator[int]:
    made = os.pipe()
    yield made[0]
    for each in made:
        os.close(each)


@pytest.fixture
def tenant(broker: Broker) -> Iterator[Tenant]:
    with Tenant(Path(broker.path)) as made:
        made.get(made.open("share base"), 2 * EXTENT)
        yield made


def publish(name: str = "base", extents: int = 2, **changes: Any) -> dict[str, Any]:
    fields = {"op": "publish", "name": name, "device": "HOST", "account": "share base", "process": "t"}
    return fields | {"bytes": extents * EXTENT, "extents": extents} | changes


def shared(broker: Broker) -> list[Any]:
    return list(broker.state()["shared"])


MESSAGES = st.one_of(
    st.binary(min_size=1, max_size=5000),
    st.sampled_from(["attach", "fetch", "extents", "leave", "publish", "PUBLISH"]).flatmap(
        lambda op: st.dictionaries(
            st.sampled_from(["name", "device", "process", "first", "bytes", "extents", "account", "x"]),
            st.one_of(st.text(max_size=20), st.integers(-(2**70), 2**70), st.none(), st.lists(st.none())),
        ).map(lambda fields: json.dumps(fields | {"op": op}).encode())
    ),
    st.just(b"[" * 4000),
    st.just(b'{"op":"attach","name":"base","device":"HOST","process":"t"}'[:-9]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(st.tuples(MESSAGES, st.integers(0, 3)), min_size=1, max_size=3))
def test_garbage_ends_its_own_connection(
    broker: Broker, tenant: Tenant, pipe: int, messages: list[tuple[bytes, int]]
) -> None:
    if not shared(broker):
        keeper = Raw(broker)
        assert "error" not in keeper.ask(publish(), [pipe])
        assert keeper.ask({"op": "extents"}, [pipe, pipe])["extents"] == 2
        broker.keeper = keeper  # type: ignore[attr-defined]  # it lives as long as the broker
    until(lambda: broker.descriptors() == broker.descriptors())
    with Raw(broker) as raw, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for message, fds in messages:
            raw.send(message, [pipe] * fds)
        while raw.answer() is not None:
            break
    (still,) = shared(broker)
    assert still["members"][0]["pid"] == os.getpid() and broker.leased() == 2 * EXTENT


@pytest.mark.parametrize(
    ("message", "fds", "says"),
    [
        ({"op": "fetch", "first": 0}, 0, "FETCH with 0 descriptors is not to be said here"),
        ({"op": "extents"}, 1, "EXTENTS with 1 descriptors is not to be said here"),
        ({"op": "leave"}, 0, "LEAVE with 0 descriptors"),
        (publish(), 0, "PUBLISH with 0 descriptors"),
        (publish(), 2, "PUBLISH with 2 descriptors"),
        (publish(bytes=-1), 1, "not a message"),
        (publish(bytes=3 * EXTENT), 1, "has 4 MiB, and cannot share 6 MiB"),
        (publish(account="b"), 1, "has no account 'b' on device HOST of this broker"),
        (publish(device="GPU-1"), 1, "has no account 'share base' on device GPU-1"),
        (publish(name=""), 1, "a share has a name of 1 to 48 bytes"),
        (
            publish(extents=10**9, bytes=1),
            1,
            "has 1000000000 extents, a descriptor each, and the broker has",
        ),
        ({"op": "attach", "name": "x", "device": "GPU-1", "process": "t"}, 0, "nobody shares 'x'"),
        (b" " * 4097, 0, "a message is at most 4096 bytes"),
        (b"", 1, None),
    ],
)
def test_who_is_refused_is_told_why_and_let_go(
    broker: Broker, tenant: Tenant, pipe: int, message: Any, fds: int, says: str | None
) -> None:
    before = broker.descriptors()
    with Raw(broker) as raw:
        answer = raw.ask(message, [pipe] * fds)
        assert answer is None if says is None else says in answer["error"], answer
        if answer is not None:
            assert raw.answer() is None
    until(lambda: broker.descriptors() <= before)
    assert shared(broker) == []


def test_a_publisher_that_breaks_off_leaves_nothing(broker: Broker, tenant: Tenant, pipe: int) -> None:
    before = broker.descriptors()
    with Raw(broker) as raw:
        raw.ask(publish(), [pipe])
        assert raw.ask({"op": "extents"}, [pipe])["extents"] == 1
        assert shared(broker) == []
    until(lambda: broker.descriptors() <= before)
    with Raw(broker) as raw:
        raw.ask(publish(), [pipe])
        assert "more extents came" in raw.ask({"op": "extents"}, [pipe] * 3)["error"]
    until(lambda: broker.descriptors() <= before)
    with Raw(broker) as raw:
        raw.ask(publish(), [pipe])
        assert raw.ask({"op": "extents"}, [pipe] * 2)["extents"] == 2
        assert len(shared(broker)) == 1
        raw.send({"op": "leave"})
    until(lambda: broker.descriptors() <= before)
    assert shared(broker) == [] and broker.leased() == 2 * EXTENT


def test_of_two_who_publish_at_once_one_is_refused(broker: Broker, tenant: Tenant, pipe: int) -> None:
    tenant.get(tenant.open("other"), 2 * EXTENT)
    with Raw(broker) as one, Raw(broker) as other:
        one.ask(publish(), [pipe])
        other.ask(publish(account="other"), [pipe])
        assert other.ask({"op": "extents"}, [pipe] * 2)["extents"] == 2
        assert "'base' is shared already" in one.ask({"op": "extents"}, [pipe] * 2)["error"]
        assert shared(broker)[0]["name"] == "base"


def test_memory_that_is_none_hurts_who_maps_it(broker: Broker, tenant: Tenant, pipe: int) -> None:
    header = os.memfd_create("header")
    os.write(header, b'{"extents":[2097152,2097152],"tensors":{}}')
    with Raw(broker) as raw:
        raw.ask(publish(), [header])
        raw.ask({"op": "extents"}, [pipe] * 2)
        with pytest.raises(tem.DriverError, match="the descriptor is of no exported memory"):
            tem.attach("base", device="host", broker=broker.path)
        until(lambda: len(shared(broker)[0]["members"]) == 1)
        os.pwrite(header, b"no header", 0)
        with pytest.raises(tem.BrokerError, match="has no header that makes sense"):
            tem.attach("base", device="host", broker=broker.path)
        until(lambda: len(shared(broker)[0]["members"]) == 1)
    os.close(header)


def test_who_asks_and_does_not_read_is_let_go(broker: Broker, tenant: Tenant, pipe: int) -> None:
    with Raw(broker) as keeper:
        keeper.ask(publish(), [pipe])
        keeper.ask({"op": "extents"}, [pipe] * 2)
        with Raw(broker) as raw:
            assert raw.ask({"op": "attach", "name": "base", "device": "HOST", "process": "t"})["fds"] == 1
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(100):
                    raw.send({"op": "fetch", "first": 0})
            until(lambda: not _connected(raw))
        assert keeper.ask({"op": "fetch", "first": 1})["fds"] == 1


def _connected(raw: Raw) -> bool:
    try:
        raw.socket.send(b'{"op":"fetch","first":0}', socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def test_a_crowd_is_turned_away_and_tenants_are_not(directory: Path, pipe: int) -> None:
    broker = Broker(directory, files=120)
    try:
        with keeping(broker, pipe) as keeper, contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(Raw(broker)) for _ in range(200)]
            assert "too many processes are connected" in crowd[-1].answer()["error"]
            with Tenant(Path(broker.path)) as late:
                assert late.get(late.open("other"), EXTENT) == EXTENT
            assert keeper.ask({"op": "fetch", "first": 0})["fds"] == 2
    finally:
        broker.end()


def test_without_descriptors_who_sends_some_is_told(directory: Path, pipe: int) -> None:
    broker = Broker(directory, files=120)
    try:
        with (
            keeping(broker, pipe) as keeper,
            Tenant(Path(broker.path)) as tenant,
            Raw(broker) as raw,
            contextlib.ExitStack() as stack,
        ):
            tenant.get(tenant.open("other"), 2 * EXTENT)
            raw.ask(publish("other", account="other"), [pipe])
            for _ in range(150):
                stack.enter_context(Tenant(Path(broker.path), hello=False))
            until(lambda: broker.descriptors() >= 119)
            assert "may open no more files" in raw.ask({"op": "extents"}, [pipe] * 2)["error"]
            assert keeper.ask({"op": "fetch", "first": 0})["fds"] == 2
            assert len(shared(broker)) == 1
        until(lambda: broker.descriptors() < 60)
        with Raw(broker) as late:
            answer = late.ask({"op": "attach", "name": "x", "device": "HOST", "process": "t"})
            assert "nobody shares 'x'" in answer["error"]
    finally:
        broker.end()


@contextlib.contextmanager
def keeping(broker: Broker, pipe: int) -> Iterator[Raw]:
    """A member that has shared two extents."""
    with Tenant(Path(broker.path)) as tenant, Raw(broker) as keeper:
        tenant.get(tenant.open("share base"), 2 * EXTENT)
        keeper.ask(publish(), [pipe])
        assert keeper.ask({"op": "extents"}, [pipe] * 2)["extents"] == 2
        yield keeper
