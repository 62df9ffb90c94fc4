"""An account that goes while no broker answers is closed there too, and its name is free again."""

from __future__ import annotations

import threading
import time

import pytest

import torch_elastic_mem as tem
from tests.client.conftest import Opened
from tests.client.scripted import Scripted
from torch_elastic_mem.broker.protocol import NOT_PERMITTED, Close, Hello, Open, Refused, encode


@pytest.fixture
def alone(opened: Opened, broker: Scripted) -> tem.Account:
    """An account that holds a lease, and no broker takes its process's connection."""
    account, _ = opened("passing")
    memory = account.range("8MiB")
    memory.grow("8MiB")
    broker.refuse_hello = encode(0, Refused(NOT_PERMITTED, "not now"))
    broker.drop()
    broker.await_count(Hello, 2)
    memory.close()
    return account


def test_an_account_that_was_closed_without_a_broker_is_closed_there_once_there_is_one(
    alone: tem.Account, broker: Scripted
) -> None:
    alone.close()
    assert broker.got(Close) == []
    broker.refuse_hello = None
    broker.await_count(Close, 1)
    assert [(each.name, each.lease) for each in broker.got(Open)[1:]] == [("passing", 0)]
    hellos = len(broker.got(Hello))
    broker.drop()
    broker.await_count(Hello, hellos + 1)
    time.sleep(0.2)
    assert len(broker.got(Open)) == 2, "and forgotten then"


def test_its_name_may_be_used_again_whenever_that_is(
    alone: tem.Account, arena: tem.Arena, broker: Scripted
) -> None:
    alone.close()
    made: list[tem.Account] = []
    opening = threading.Thread(target=lambda: made.append(arena.account("passing")))
    opening.start()
    opening.join(0.05)
    broker.refuse_hello = None
    opening.join(10)
    made[0].range("8MiB").grow("8MiB")
    for _ in range(20):
        last = arena.account("passing too")
        broker.refuse_hello = encode(0, Refused(NOT_PERMITTED, "not now"))
        hellos = len(broker.got(Hello))
        broker.drop()
        broker.await_count(Hello, hellos + 1)
        last.close()
        hellos = len(broker.got(Hello))
        broker.refuse_hello = None
        broker.await_count(Hello, hellos + 1)
        arena.account("passing too").close()


def test_a_name_is_waited_for_while_its_last_account_is_on_its_way_out(
    alone: tem.Account, arena: tem.Arena, broker: Scripted
) -> None:
    alone.close()
    broker.mute = True
    broker.refuse_hello = None
    broker.await_count(Open, 2)
    opening = threading.Thread(target=lambda: arena.account("passing"))
    opening.start()
    opening.join(0.2)
    assert opening.is_alive() and len(broker.got(Open)) == 2
    broker.speak()
    opening.join(10)
    assert not opening.is_alive()
    assert len(broker.got(Close)) == 1 and len(broker.got(Open)) == 3
