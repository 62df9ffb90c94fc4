"""What is idle is exported before anybody asks: on a GPU that takes longer than all else of a yield."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

import torch_elastic_mem as tem
from tests.arena.watch import calls, comes_true
from tests.client.conftest import Opened
from tests.client.files import descriptors_of, file_under
from tests.client.scripted import MiB, Scripted, close, idle
from tests.rungs import CudaRung, FakeRung, Rung
from torch_elastic_mem.broker.protocol import PASS_ON, Report

EXTENT = 4 * MiB


def exports(rung: FakeRung) -> int:
    return calls(rung, "cuMemExportToShareableHandle")


@pytest.fixture
def files_seen(rung: Rung) -> None:
    if isinstance(rung, CudaRung):
        pytest.skip("a GPU's memory has no files to count")


@pytest.mark.usefixtures("files_seen")
def test_what_is_idle_has_a_descriptor_each_in_time(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = idle(account, 16 * MiB)
    file = file_under(memory.address)
    # The backend has one of its own.
    assert comes_true(lambda: descriptors_of({file}) == 1 + 4)
    broker.ask(number, 16 * MiB, flags=PASS_ON)
    passed = broker.passed()
    assert {os.fstat(descriptor).st_ino for _, descriptor in passed} == {file}
    close(passed)
    assert comes_true(lambda: descriptors_of({file}) == 1), "nothing of what has been passed on is left"


@pytest.mark.rungs("fake")
def test_what_is_in_use_is_not_exported(rung: FakeRung, opened: Opened, broker: Scripted) -> None:
    before = exports(rung)
    account, _ = opened()
    used = account.range(16 * MiB, keep=16 * MiB, extent=EXTENT)
    used.grow(16 * MiB)
    memory = idle(account, EXTENT)
    assert comes_true(lambda: exports(rung) > before)
    assert exports(rung) == before + 1
    assert memory.mapped == 0


@pytest.mark.rungs("fake")
def test_giving_what_was_exported_ahead_exports_nothing(
    rung: FakeRung, opened: Opened, broker: Scripted
) -> None:
    before = exports(rung)
    account, number = opened()
    memory = idle(account, 16 * MiB)
    assert comes_true(lambda: exports(rung) == before + 4)
    broker.ask(number, 16 * MiB, flags=PASS_ON)
    passed = broker.passed()
    assert passed
    close(passed)
    assert exports(rung) == before + 4
    memory.close()


@pytest.mark.usefixtures("files_seen")
def test_memory_that_goes_to_the_device_is_not_kept_by_its_descriptor(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = idle(account, 16 * MiB)
    file = file_under(memory.address)
    assert comes_true(lambda: descriptors_of({file}) == 1 + 4)
    broker.ask(number, 16 * MiB)
    assert broker.passed() == []
    assert descriptors_of({file}) == 1
    assert arena.snapshot().lost == 0


@pytest.mark.rungs("fake")
def test_at_most_so_many_of_a_range_cost_a_descriptor(rung: FakeRung, tmp_path: Path) -> None:
    broker = Scripted(tmp_path, free=256 * MiB)
    try:
        account = rung.arena("256MiB", broker=broker.path).account("training", "training")
        before = exports(rung)
        memory = account.range(200 * MiB, keep=200 * MiB, extent=2 * MiB)
        memory.grow(200 * MiB)
        memory.shrink(200 * MiB)
        assert comes_true(lambda: exports(rung) == before + 64)
        account.note_blocks(1, 2, 3, 4)  # has it look again
        reports = len(broker.got(Report))
        broker.await_count(Report, reports + 1)
        assert exports(rung) == before + 64
        memory.close()
        account.close()
    finally:
        broker.close()


@pytest.mark.rungs("fake")
@pytest.mark.parametrize("nth", range(1, 7))
def test_whichever_call_fails_meanwhile_nothing_is_lost(
    rung: FakeRung, arena: tem.Arena, opened: Opened, broker: Scripted, nth: int
) -> None:
    account, number = opened()
    memory = account.range(16 * MiB, keep=16 * MiB, extent=EXTENT)
    memory.grow(16 * MiB)
    rung.fail_nth(nth)
    with suppress(tem.DriverError):
        memory.shrink(16 * MiB)
    assert comes_true(lambda: rung.calls() >= nth)
    rung.fail_nth(0)
    if memory.mapped:
        memory.shrink(memory.mapped)
    answers = broker.ask(number, 16 * MiB, flags=PASS_ON)
    assert sum(answer.bytes for answer in answers) == 16 * MiB
    close(broker.passed())
    assert arena.snapshot().lost == 0
