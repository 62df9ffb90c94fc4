"""What a process says of its accounts for people to look at."""

from __future__ import annotations

import threading
import time

import pytest

import torch_elastic_mem as tem
from tests.client.conftest import Opened
from tests.client.scripted import MiB, Scripted
from torch_elastic_mem.broker.protocol import Close, Report


def test_what_is_held_and_idle_is_reported(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    account.on_reclaim(lambda nbytes, timeout: None, "spill")
    memory = account.range("8MiB", keep="8MiB", extent="2MiB")
    memory.grow("8MiB")
    memory.shrink("6MiB")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        reports = broker.got(Report)
        if reports and (reports[-1].held, reports[-1].idle) == (8 * MiB, 6 * MiB):
            break
        time.sleep(0.02)
    assert reports[-1] == Report(number, 1 << 2, 8 * MiB, 6 * MiB)


def test_of_an_account_that_is_being_closed_nothing_is_reported(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("8MiB")
    memory.grow("8MiB")
    assert broker.await_count(Report, 1)[-1] == Report(number, 0, 8 * MiB, 0)
    broker.mute = True
    memory.close()
    closing = threading.Thread(target=account.close)
    closing.start()
    broker.await_count(Close, 1)
    time.sleep(0.3)  # in which there would be a report
    broker.speak()
    closing.join(10)
    assert not closing.is_alive()
    said = [message for _, message in broker.log if isinstance(message, Report | Close)]
    assert isinstance(said[-1], Close)


def test_what_an_engine_says_of_its_blocks_is_reported_once(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    account.note_blocks(1, 2, 3, 4)
    assert broker.await_count(Report, 1)[-1] == Report(number, 0, 0, 0, 1, 2, 3, 4)
    account.note_blocks(1, 2, 3, 4)
    account.note_blocks(2, 2, 2, 4)
    assert broker.await_count(Report, 2) == [
        Report(number, 0, 0, 0, 1, 2, 3, 4),
        Report(number, 0, 0, 0, 2, 2, 2, 4),
    ]
    account.close()
    with pytest.raises(tem.ClosedError):
        account.note_blocks(0, 0, 0, 0)
