"""Processes yield to each other through a real broker."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.processes.conftest import Machine, MiB, Refused


def test_idle_memory_of_a_lower_class_goes_to_a_higher_one_in_another_process(machine: Machine) -> None:
    hog = machine.peer("training")
    hog("grow", 120 * MiB)
    hog("shrink", 120 * MiB)
    assert hog("held") == 120 * MiB
    taker = machine.peer("serving")
    assert taker("grow", 64 * MiB) == 64 * MiB
    assert hog("held") <= 64 * MiB


@pytest.mark.rungs("host")
@pytest.mark.rungs("fake")  # a GPU's memory is in no file that could be looked at
def test_what_a_process_yields_is_the_very_memory_that_the_other_gets(machine: Machine) -> None:
    hog = machine.peer("training")
    hog("grow", 120 * MiB)
    ((file, _),) = hog.files().items()
    hog("shrink", 120 * MiB)
    taker = machine.peer("serving")
    taker("grow", 64 * MiB)
    # 8 MiB were free.
    assert taker.files()[file] == 56 * MiB


def test_no_yield_waits_for_the_kernel_to_widen_a_table_of_descriptors(machine: Machine) -> None:
    for pid, wanted in ((machine.peer().pid, 4096), (machine.service.pid, 1 << 16)):
        limit = int(file_of(pid, "limits").split("Max open files")[1].split()[0])
        assert int(file_of(pid, "status").split("FDSize:")[1].split()[0]) >= min(wanted, limit)


def file_of(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def test_memory_comes_from_a_process_whose_python_is_busy(machine: Machine) -> None:
    hog = machine.peer("training")
    hog("grow", 120 * MiB)
    hog("shrink", 120 * MiB)
    taker = machine.peer("serving")
    hog("hold_gil")
    assert taker("grow", 64 * MiB) == 64 * MiB
    hog("held")


def test_a_reclaimer_runs_where_idle_memory_is_not_enough(machine: Machine) -> None:
    hog = machine.peer("training", keep=False)
    hog("grow", 120 * MiB)
    hog("reclaimer", "spill")
    taker = machine.peer("serving")
    assert taker("grow", 64 * MiB) == 64 * MiB
    assert sum(hog("was_asked")) >= 56 * MiB


def test_a_lower_class_is_refused_in_words_and_nobody_is_disturbed(machine: Machine) -> None:
    server = machine.peer("serving")
    server("grow", 120 * MiB)
    trainer = machine.peer("training")
    with pytest.raises(Refused) as refused:
        trainer("grow", 64 * MiB, 0.3)
    says = str(refused.value)
    assert "account 'training' asked for 64 MiB" in says
    assert "serving/" in says
    assert server("held") == 120 * MiB


def test_memory_comes_back_when_the_higher_class_has_done(machine: Machine) -> None:
    hog = machine.peer("training")
    hog("grow", 120 * MiB)
    hog("shrink", 120 * MiB)
    taker = machine.peer("serving", keep=False)
    taker("grow", 100 * MiB)
    taker("shrink", 100 * MiB)
    assert hog("grow", 100 * MiB) >= 100 * MiB


def test_all_goes_back_at_the_end(machine: Machine) -> None:
    peers = [machine.peer("training"), machine.peer("serving"), machine.peer("idle")]
    for peer in peers:
        peer("grow", 32 * MiB)
    for peer in peers:
        peer("close")
    machine.await_leased(0)


def test_two_accounts_of_a_class_share_by_weight(machine: Machine) -> None:
    first = machine.peer("training")
    first("grow", 128 * MiB)
    first("shrink", 128 * MiB)
    second = machine.peer("training")
    assert second("grow", 60 * MiB) == 60 * MiB
    with pytest.raises(Refused):
        machine.peer("training")("grow", 100 * MiB, 0.3)


def test_ranks_grow_together_or_not_at_all(machine: Machine) -> None:
    first, second = machine.peer("serving"), machine.peer("serving")
    first.tell("reserve", 32 * MiB, "tp", 2, 1)
    second.tell("reserve", 32 * MiB, "tp", 2, 1)
    assert (first.hear(), second.hear()) == (32 * MiB, 32 * MiB)
    first.tell("reserve", 16 * MiB, "tp", 2, 2, 1.0)
    second.tell("reserve", 512 * MiB, "tp", 2, 2, 1.0)
    for rank in (first, second):
        with pytest.raises(Refused):
            rank.hear()
    assert (first("held"), second("held")) == (32 * MiB, 32 * MiB)


@pytest.mark.slow
@pytest.mark.rungs("host")
def test_training_under_pressure_computes_what_it_computes_alone(machine: Machine, tmp_path: Path) -> None:
    alone = machine.peer("training")
    alone("train")
    while alone("steps") < 40:
        time.sleep(0.05)
    wanted = alone("trained")
    alone.kill()
    trainer = machine.peer("training")
    trainer("train")
    taker = machine.peer("serving", keep=False)
    while trainer("steps") < 40:
        taker("grow", 64 * MiB)
        time.sleep(0.05)
        taker("shrink", 64 * MiB)
        time.sleep(0.05)
    losses = trainer("trained")
    assert losses[:40] == wanted[:40]
