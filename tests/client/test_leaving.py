"""An account that goes while no broker answers is closed there too, and its name is free again."""

from __future__ import annotations

import threading
import time

import pytest

import torch_elastic_mem as tem
from tests.client.conftest import Opened
from tests.client.scripted import MiB, Scripted
from torch_elastic_mem.broker.protocol import NOT_PERMITTED, Bye, Close, Hello, Message, Open, Refused, encode

NOT_NOW = encode(0, Refused(NOT_PERMITTED, "not now"))


@pytest.fixture
def alone(opened: Opened, broker: Scripted) -> tem.Account:
    """An account that holds a lease, and no broker takes its process's connection."""
    account, _ = opened("passing")
    memory = account.range("8MiB")
    memory.grow("8MiB")
    broker.refuse_hello = NOT_NOW
    broker.drop()
    broker.await_count(Hello, 2)
    memory.close()
    return account


def test_an_account_that_was_closed_without_a_broker_is_closed_there_once_there_is_one(
    alone: tem.Account, arena: tem.Arena, broker: Scripted
) -> None:
    alone.close()
    assert broker.got(Close) == []
    broker.refuse_hello = None
    broker.await_count(Close, 1)
    assert [(each.name, each.lease) for each in broker.got(Open)[1:]] == [("passing", 0)]
    arena.account("next")  # answered behind it
    broker.drop()
    broker.await_count(Open, 4)
    time.sleep(0.2)
    assert [each.name for each in broker.got(Open)[2:]] == ["next", "next"], "and forgotten then"


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
        broker.refuse_hello = NOT_NOW
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


def said(broker: Scripted) -> list[Message]:
    """What came over the connection that came last."""
    messages = [message for _, message in broker.log]
    return messages[max(at for at, one in enumerate(messages) if isinstance(one, Hello)) :]


def test_an_arena_that_is_closed_without_a_broker_says_what_is_left_once_there_is_one(
    alone: tem.Account, arena: tem.Arena, broker: Scripted
) -> None:
    alone.close()
    hellos = len(broker.got(Hello))
    broker.await_count(Hello, hellos + 1)  # the next would come in a tenth of a second
    broker.refuse_hello = None
    arena.close()
    broker.await_count(Bye, 1)
    _, opening, closing, bye = said(broker)
    assert isinstance(opening, Open) and (opening.name, opening.lease) == ("passing", 0)
    assert isinstance(closing, Close) and isinstance(bye, Bye)


@pytest.mark.parametrize("listens", [True, False], ids=["stands still", "has gone"])
def test_an_arena_is_closed_though_its_broker(
    alone: tem.Account, arena: tem.Arena, broker: Scripted, listens: bool
) -> None:
    alone.close()
    if listens:
        broker.stand_still()
    else:
        broker.close()
    arena.close()
    with pytest.raises(tem.ClosedError):
        arena.snapshot()


@pytest.mark.slow
def test_an_account_whose_opening_was_not_answered_is_closed_over_the_next_connection(
    arena: tem.Arena, broker: Scripted
) -> None:
    broker.mute = True
    with pytest.raises(tem.BrokerError, match="does not answer"):
        arena.account("late", min="8MiB")
    broker.mute = False
    broker.drop()
    broker.await_count(Close, 1)
    assert {(each.name, each.lease) for each in broker.got(Open)} == {("late", 0)}
    assert not arena.snapshot().accounts


@pytest.mark.slow
def test_an_account_whose_opening_anew_was_not_answered_is_closed_with_its_lease(
    opened: Opened, broker: Scripted
) -> None:
    account, _ = opened()
    memory = account.range("8MiB")
    memory.grow("8MiB")
    broker.mute = True
    broker.drop()
    broker.await_count(Open, 2)
    memory.close()
    account.close()
    broker.await_count(Open, 3)
    broker.speak()
    broker.await_count(Close, 1)
    broker.await_charge(0)
    assert broker.got(Open)[1].lease >= 8 * MiB and broker.got(Open)[-1].lease == 0
