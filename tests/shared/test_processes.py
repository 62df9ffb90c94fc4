"""Weights between processes: who may read, who is charged, and who may die when."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import torch_elastic_mem as tem
from tests.rungs import CudaRung, FakeRung, Rung
from tests.shared.processes import Broker, MiB, Sharer, until

Start = Callable[..., Sharer]


pytestmark = pytest.mark.slow_on("fake")


@pytest.fixture
def start(rung: Rung, sharer: Start, request: pytest.FixtureRequest) -> Start:
    library = str(request.getfixturevalue("fake_library")) if isinstance(rung, FakeRung) else ""
    return lambda **environment: sharer(rung.device, library, **environment)


def test_others_read_what_was_shared_bit_for_bit(start: Start, broker: Broker) -> None:
    one, other = start(), start()
    one.ask("share", "base", 3)
    other.ask("attach", "base")
    assert one.ask("same", 3) and other.ask("same", 3)
    assert one.ask("read_only") and other.ask("read_only")


@pytest.mark.parametrize("end", ["close", "kill"])
def test_who_comes_after_the_publisher_has_gone_is_served(start: Start, broker: Broker, end: str) -> None:
    one, other, late = start(), start(), start()
    one.ask("share", "base")
    other.ask("attach", "base")
    one.kill() if end == "kill" else one.ask("close")
    until(lambda: len(broker.state()["shared"][0]["members"]) == 1)
    late.ask("attach", "base")
    assert late.ask("same") and other.ask("same")


def test_memory_is_charged_once_and_each_member_counts_for_its_part(start: Start, broker: Broker) -> None:
    members = [start(), start(), start()]
    members[0].ask("share", "base")
    for each in members[1:]:
        each.ask("attach", "base")
    state = broker.state()
    (shared,) = state["shared"]
    assert state["leased"] == shared["bytes"] == 6 * MiB
    assert [each["pid"] for each in shared["members"]] == [each.pid for each in members]
    assert sum(each["share"] for each in shared["members"]) == shared["bytes"]
    assert [(each["name"], each["lease"]) for each in state["accounts"]] == [("share base", 6 * MiB)]


def test_the_last_to_leave_frees_it_however_members_end(start: Start, broker: Broker) -> None:
    one, other, third = start(), start(), start()
    before = broker.descriptors()
    one.ask("share", "base")
    for each in (other, third):
        each.ask("attach", "base")
    one.kill()
    other.ask("close")
    until(lambda: len(broker.state()["shared"][0]["members"]) == 1)
    assert broker.leased() == 6 * MiB
    third.kill()
    until(lambda: broker.leased() == 0 and broker.descriptors() <= before)
    assert broker.state()["shared"] == []
    assert broker.state()["accounts"] == []
    fresh = start()
    with pytest.raises(tem.InvalidArgument, match="nobody shares 'base'"):
        fresh.ask("attach", "base")


def test_a_tensor_that_outlives_the_close_keeps_its_process_a_member(start: Start, broker: Broker) -> None:
    one = start()
    one.ask("share", "base")
    one.ask("keep", "large")
    one.ask("close")
    assert broker.leased() == 6 * MiB
    one.ask("drop")
    until(lambda: broker.leased() == 0)


def test_who_writes_is_hurt_alone(rung: Rung, start: Start, broker: Broker) -> None:
    one, other, late = start(), start(), start()
    writers = {by: start() for by in ("kernel", "memset", "copy")}
    one.ask("share", "base")
    other.ask("attach", "base")
    for by, writer in writers.items():
        writer.ask("attach", "base")
        # A fault of the host's memory ends the process; one of the GPU's is an error of every later call.
        if isinstance(rung, CudaRung):
            with pytest.raises(RuntimeError, match="CUDA"):
                writer.ask("write", "large", by)
        else:
            with pytest.raises(EOFError, match=str(-signal.SIGSEGV)):
                writer.ask("write", "large", by)
        assert one.ask("same") and other.ask("same")
        writer.end()
        until(lambda: len(broker.state()["shared"][0]["members"]) == 2)
    late.ask("attach", "base")
    assert late.ask("same")


def test_a_driver_without_read_only_mappings_is_told_of(sharer: Start, fake_library: Path) -> None:
    one = sharer("cuda", str(fake_library), FAKE_CUDA_NO_READ_ONLY="1")
    one.ask("share", "base")
    assert one.ask("same") and not one.ask("read_only")


def test_a_name_is_taken_while_it_is_shared(start: Start, broker: Broker) -> None:
    one, other = start(), start()
    one.ask("share", "base")
    with pytest.raises(tem.InUseError, match=f"'base' is shared already, 6 MiB by .*/{one.pid}"):
        other.ask("share", "base")
    assert broker.leased() == 6 * MiB and one.ask("same")
    other.ask("share", "other")
    assert broker.leased() == 12 * MiB
    one.ask("close")
    until(lambda: broker.leased() == 6 * MiB)
    other.ask("share", "base")


@pytest.mark.slow
def test_an_unknown_name_is_answered_with_those_there_are(start: Start, broker: Broker) -> None:
    one, other = start(), start()
    one.ask("share", "base")
    with pytest.raises(tem.InvalidArgument, match=r"nobody shares 'bass' here; user \d+ has 'base'"):
        other.ask("attach", "bass")
    assert other.ask("attach", "base")


@pytest.mark.slow
def test_weights_are_on_one_device(sharer: Start, fake_library: Path) -> None:
    one = sharer("cuda:0", str(fake_library))
    one.ask("share", "base")
    for other in (sharer("cuda:1", str(fake_library)), sharer("host")):
        with pytest.raises(tem.InvalidArgument, match=r"'base' is on device GPU-.*, and was asked for on"):
            other.ask("attach", "base")


@pytest.mark.slow
def test_after_the_broker_members_read_on_and_nobody_comes(start: Start, broker: Broker) -> None:
    one, other, late = start(), start(), start()
    one.ask("share", "base")
    other.ask("attach", "base")
    broker.end(signal.SIGKILL)
    assert one.ask("same") and other.ask("same")
    with pytest.raises(tem.BrokerError, match=r"no broker keeps shared memory at .*tem serve"):
        late.ask("attach", "base")
    again = Broker(Path(broker.path).parent)
    try:
        with pytest.raises(tem.InvalidArgument, match=r"nobody shares 'base'|has any memory"):
            late.ask("attach", "base")
        # Whoever has it leaves no trace in the new broker.
        other.ask("close")
        one.ask("share", "base")
        late.ask("attach", "base")
        assert late.ask("same") and one.ask("same")
    finally:
        again.end()


@pytest.mark.slow
@pytest.mark.rungs("host")
@pytest.mark.rungs("fake")  # the real driver needs files of its own before it comes to ours
def test_a_process_that_may_open_few_files_attaches_or_is_told(start: Start, broker: Broker) -> None:
    one, other = start(), start()
    one.ask("share", "base")
    other.ask("files", 7)
    with pytest.raises((tem.DriverError, tem.BrokerError)):
        other.ask("attach", "base")
    assert one.ask("same")
    until(lambda: len(broker.state()["shared"][0]["members"]) == 1)
