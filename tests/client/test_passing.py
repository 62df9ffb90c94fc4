"""Memory that goes from process to process as it is, without the driver's release and create."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import torch_elastic_mem as tem
from tests.client.conftest import Opened
from tests.client.files import descriptors_of, file_under
from tests.client.scripted import MiB, Scripted, close, idle
from tests.rungs import CudaRung, Rung
from torch_elastic_mem.broker.protocol import PASS_ON, Demand, Gave, Grant, Return
from torch_elastic_mem.elastic_range import ElasticRange


@pytest.fixture(autouse=True)
def _no_descriptor_stays_open(arena: tem.Arena, broker: Scripted) -> Iterator[None]:
    """What was passed on and back is closed by whoever had it last."""
    yield
    assert broker.passed() == []


def grow_with(broker: Scripted, memory: ElasticRange, nbytes: int, passed: list[tuple[int, int]]) -> None:
    """Grows, and the broker grants it with memory passed on."""
    broker.policy = lambda demand: None
    demands = len(broker.got(Demand))
    growing = threading.Thread(target=memory.grow, args=(nbytes,))
    growing.start()
    demand = broker.await_count(Demand, demands + 1)[-1]
    broker.answer(Grant(demand.account, demand.bytes), passed)
    growing.join(10)
    broker.policy = broker.grant_what_is_free


def test_what_is_given_is_passed_on_where_the_broker_wants_it(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = idle(account, 16 * MiB)
    answers = broker.ask(number, 16 * MiB, flags=PASS_ON)
    assert sum(answer.bytes for answer in answers) == 16 * MiB
    passed = broker.passed()
    assert 0 < sum(nbytes for nbytes, _ in passed) <= 16 * MiB
    assert arena.snapshot().created <= broker.charged[number]
    close(passed)
    assert memory.mapped == 0


def test_without_the_flag_nothing_is_passed_on(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = idle(account, 16 * MiB)
    broker.ask(number, 16 * MiB)
    assert broker.passed() == []
    memory.close()


def test_descriptors_come_before_the_answer_that_gives_their_bytes(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = idle(account, 16 * MiB)
    broker.ask(number, 16 * MiB, flags=PASS_ON)
    kinds = [type(message).__name__ for _, message in broker.log]
    assert kinds.index("Pass") < kinds.index("Gave")
    close(broker.passed())
    memory.close()


def test_memory_that_came_is_mapped_and_reads_as_zeros(
    rung: Rung, arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = account.range("16MiB", keep="16MiB", extent="4MiB")
    memory.grow("16MiB")
    rung.write(memory.address, b"secret" * 100)
    memory.shrink("16MiB")
    broker.ask(number, 64 * MiB, flags=PASS_ON)
    passed = broker.passed()
    assert sum(nbytes for nbytes, _ in passed) == 16 * MiB
    files = {os.fstat(descriptor).st_ino for _, descriptor in passed}
    other, _ = opened("server", "serving")
    taken = other.range("16MiB", extent="4MiB")
    grow_with(broker, taken, 16 * MiB, passed)
    close(passed)
    assert taken.mapped == 16 * MiB
    assert rung.read(taken.address, 600) == bytes(600)
    if not isinstance(rung, CudaRung):
        assert file_under(taken.address) in files
    assert arena.snapshot().created <= sum(broker.charged.values())


def test_it_can_be_passed_on_again(rung: Rung, opened: Opened, broker: Scripted) -> None:
    """The driver exports no handle that it has imported: the descriptor that came goes on."""
    account, number = opened()
    memory = idle(account, 8 * MiB)
    for _ in range(3):
        broker.ask(number, 64 * MiB, flags=PASS_ON)
        passed = broker.passed()
        assert sum(nbytes for nbytes, _ in passed) == 8 * MiB
        grow_with(broker, memory, 8 * MiB, passed)
        close(passed)
        rung.write(memory.address, b"x")
        memory.shrink("8MiB")


def test_a_descriptor_of_something_else_costs_only_itself(
    tmp_path: Path, opened: Opened, broker: Scripted
) -> None:
    account, _ = opened()
    memory = account.range("8MiB", extent="4MiB")
    with (tmp_path / "file").open("wb") as file:
        grow_with(broker, memory, 8 * MiB, [(4 * MiB, os.dup(file.fileno()))])
    assert memory.mapped == 8 * MiB


def test_extents_of_another_size_go_to_the_device(arena: tem.Arena, opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = idle(account, 16 * MiB)
    broker.ask(number, 64 * MiB, flags=PASS_ON)
    passed = broker.passed()
    memory.close()
    memory = account.range("16MiB", extent="16MiB")
    grow_with(broker, memory, 16 * MiB, passed)
    close(passed)
    assert memory.mapped == 16 * MiB
    assert arena.snapshot().created <= sum(broker.charged.values())


def test_a_grant_that_nobody_waits_for_any_more_takes_its_memory_back(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = idle(account, 8 * MiB)
    broker.ask(number, 64 * MiB, flags=PASS_ON)
    passed = broker.passed()
    broker.policy = lambda demand: None
    with pytest.raises(tem.OutOfMemory):
        memory.grow("8MiB", timeout=0.05)
    broker.answer(Grant(number, 8 * MiB), passed)
    close(passed)
    returned = lambda: sum(  # noqa: E731
        message.bytes for _, message in broker.log if isinstance(message, Return | Gave)
    )
    broker.await_count(Return, 1)
    assert returned() > 0
    assert arena.snapshot().created <= sum(broker.charged.values())


def test_a_forked_child_keeps_none_of_it_alive(rung: Rung, opened: Opened, broker: Scripted) -> None:
    """A loader's worker lives as long as the training, and would keep what its parent gives back."""
    account, number = opened()
    memory = idle(account, 8 * MiB)
    broker.ask(number, 64 * MiB, flags=PASS_ON)
    passed = broker.passed()
    files = {os.fstat(descriptor).st_ino for _, descriptor in passed}
    grow_with(broker, memory, 8 * MiB, passed)
    close(passed)
    if isinstance(rung, CudaRung):
        return  # its memory has no files
    # The host's and the fake's driver have one of an extent for themselves.
    before = descriptors_of(files)
    child = os.fork()
    if child == 0:
        os._exit(0 if descriptors_of(files) == before - len(passed) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_extent_that_is_not_what_was_said_of_it_spoils_one_growth_at_most(
    opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = account.range("4MiB", keep="4MiB", extent="4MiB")
    memory.grow("4MiB")
    memory.shrink("4MiB")
    broker.ask(number, 62 * MiB, flags=PASS_ON)
    ((_, descriptor),) = broker.passed()
    memory.close()
    memory = account.range("2MiB", extent="2MiB")
    broker.policy = lambda demand: None
    demands = len(broker.got(Demand))
    failed: list[tem.TemError] = []

    def grow() -> None:
        try:
            memory.grow("2MiB")
        except tem.TemError as error:
            failed.append(error)

    growing = threading.Thread(target=grow)
    growing.start()
    demand = broker.await_count(Demand, demands + 1)[-1]
    broker.answer(Grant(demand.account, demand.bytes), [(2 * MiB, descriptor)])
    growing.join(10)
    os.close(descriptor)
    assert len(failed) == 1, "4 MiB do not go where 2 are wanted"
    broker.policy = broker.grant_what_is_free
    memory.grow("2MiB")
    assert memory.mapped == 2 * MiB
