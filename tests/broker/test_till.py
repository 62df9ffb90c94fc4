"""What the till answers by itself, and what takes a decision."""

from __future__ import annotations

import asyncio

import pytest

from tests.broker.world import Account, World
from torch_elastic_mem.broker.protocol import ProtocolError, Return
from torch_elastic_mem.broker.shares import Member


def answers(world: World, account: Account, bytes: int = 1) -> bool:
    """Whether the till takes bytes back and grants them."""
    before = world.at_the_till
    account.put(bytes)
    account.demand(bytes, rung=255)
    assert world.at_the_till - before in (0, 2)
    return world.at_the_till > before


def test_while_memory_is_free_the_till_answers_all() -> None:
    world = World(reserve=(5, 20), till=True)
    low, high = world.player().open("low", 0), world.player().open("high", 100)
    before = world.at_the_till
    assert low.get(30, 35) == 35
    assert high.get(40) == 40
    low.put(35)
    assert low.get(40) == 40
    assert world.at_the_till == before + 4
    assert world.device().leased == 80
    assert [event.bytes for event in world.broker.events(0) if event.kind == "grant"] == [35, 40, 40]


def test_bytes_between_the_marks_take_a_decision() -> None:
    world = World(reserve=(5, 20), till=True)
    low, high = world.player().open("low", 0), world.player().open("high", 100)
    assert low.get(80) == 80
    before = world.at_the_till
    assert high.get(1) == 1
    assert low.asked() == [(1, 0)]
    assert world.at_the_till == before


def test_a_till_that_nobody_reads_grants_so_much_and_no_more() -> None:
    world = World(capacity=10_000, till=True)
    account = world.player().open("a")
    till = world.broker.books["HOST"].accounts.till
    granted = [till.grant(account.player.session.number, account.number, 1, 1, 0) for _ in range(2000)]
    assert granted == [1] * 1024 + [None] * 976
    assert world.lease("a") == world.account("a").taken == 1024
    world.deliver()
    assert account.get(1) == 1


def test_a_grant_that_cannot_be_told_is_undone() -> None:
    world = World(till=True)
    account = world.player().open("a")
    till = world.broker.books["HOST"].accounts.till
    assert till.grant(account.player.session.number, account.number, 10, 20, 0) == 20
    till.undo()
    assert (world.lease("a"), world.broker.state().grants) == (0, 0)


def test_what_others_wait_for_is_not_granted_at_the_till() -> None:
    world = World(till=True)
    low, high = world.player().open("low", 0), world.player().open("high", 100)
    low.get(60)
    assert answers(world, low)
    number = high.demand(60)
    assert not answers(world, low)
    low.give_what_is_asked()
    assert high.granted(number) == 60
    assert answers(world, high)


def test_what_somebody_was_asked_for_is_counted_by_the_books() -> None:
    world = World(till=True)
    low, high = world.player().open("low", 0), world.player().open("high", 100)
    low.get(100)
    number = high.demand(30)
    ((ask, _, _),) = low.asks()
    high.withdraw(number)
    assert not answers(world, low)
    low.give(ask, 10, coming=20)
    low.put(20)
    assert world.account("low").given == 30
    assert answers(world, low)


def test_while_a_dead_process_is_waited_for_all_is_decided() -> None:
    world = World(till=True)
    dying, account = (world.player(device="GPU-1").open(name) for name in ("dying", "b"))
    dying.get(10)
    account.get(10)
    dying.player.die()
    assert not answers(world, account)
    world.wait(1.1)
    assert answers(world, account)


def test_in_the_grace_nothing_is_granted_at_the_till() -> None:
    world = World(till=True, grace=5.0)
    account = world.player().open("a", lease=10)
    assert not answers(world, account)
    world.wait(5.1)
    assert answers(world, account)


def test_a_debtor_gets_nothing_at_the_till_of_any_device_and_others_do_where_it_has_no_account() -> None:
    world = World(till=True)
    low, high = world.player().open("low", 0), world.player().open("high", 100)
    elsewhere = world.player(process=low.player.process, device="GPU-1").open("low")
    low.get(100)
    elsewhere.get(10)
    high.demand(30, timeout=2.0)
    ((ask, _, _),) = low.asks()
    assert answers(world, elsewhere)
    stranger = world.player(device="GPU-2").open("stranger")
    stranger.get(10)
    world.wait(1.5)
    assert not answers(world, elsewhere)
    assert answers(world, stranger), "where it has no account nobody is the worse for it"
    world.player(process=low.player.process, device="GPU-2").open("late")
    assert not answers(world, stranger)
    low.give(ask, 30)
    assert answers(world, elsewhere) and answers(world, stranger)


def test_what_an_operator_wants_back_is_counted_by_the_books() -> None:
    world = World(till=True)
    account = world.player().open("a")
    account.get(100)
    reclaim = world.broker.reclaim("a", 30, 10.0)
    world.deliver()
    ((ask, _, _),) = account.asks()
    assert not answers(world, account)
    account.give(ask, 30)
    assert asyncio.run(asyncio.wait_for(reclaim, 5)) == 30
    assert answers(world, account)


def test_what_a_device_has_not_any_more_is_not_granted() -> None:
    world = World(till=True)
    account = world.player(device="GPU-1").open("a")
    account.get(100)
    world.look("GPU-1", 100, 120)
    assert not answers(world, account, 10)


def test_a_capacity_that_has_fallen_in_the_grace_is_pursued_before_a_till_opens() -> None:
    world = World(till=True, grace=5.0)
    account = world.player().open("a", lease=120)
    world.now += 6.0
    assert world.broker.state()
    world.deliver()
    account.put(10)
    assert account.asked() == [(10, 0)]


def test_what_the_publisher_of_a_share_returns_goes_to_the_share() -> None:
    world = World(till=True)
    account = world.player().open("a")
    account.get(50)
    books = world.broker.books["HOST"]
    member = Member(account.player.process, "python")
    share = books.shares.publish("w", 40, books.accounts.holders[account.number], member)
    world.deliver()
    assert not answers(world, account)
    account.put(50)
    assert world.device().leased == 40
    world.broker.books["HOST"].shares.leave(share, member)
    world.broker.tick()
    world.deliver()
    account.get(10)
    assert answers(world, account)


def test_an_account_is_served_on_its_own_connection_only() -> None:
    world = World(till=True)
    account, thief = world.player().open("a"), world.player()
    account.get(10)
    before = world.at_the_till
    with pytest.raises(ProtocolError, match="none of this connection's"):
        thief.say(Return(account.number, 1))
    with pytest.raises(ProtocolError, match="gives back 11 B but holds 10 B"):
        account.put(11)
    assert world.at_the_till == before
    account.player.lose()
    account.player.connect()
    again = account.player.open("a", lease=10)
    assert again.number == account.number
    assert answers(world, again)
