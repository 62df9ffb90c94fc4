"""Whose limits are in force: what a process wants, what its user may, what the operator has set."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import pytest

from tests.broker.world import Account, World
from torch_elastic_mem.broker.config import parse
from torch_elastic_mem.broker.protocol import UNLIMITED, Done, Limits, Open, Refused, Set, SetLimits
from torch_elastic_mem.errors import AdmissionError, InvalidArgument

T = TypeVar("T")


def test_a_user_may_ask_for_little_and_more_is_refused_not_clamped() -> None:
    world = World()
    player = world.player(uid=4321)
    player.open("modest", 100)
    refused = player.refusal(Open("a", "serving", Limits(1000), 0))
    assert refused.kind == 5
    assert refused.reason == (
        "account 'a' asks for value 1000; user 4321 may ask for at most 100; ask for less, or have the "
        "operator raise it in a [[grant]] of the broker's configuration"
    )
    assert (
        "asks for min 1 B; user 4321 may ask for at most 0 B"
        in player.refusal(Open("a", "c", Limits(0, 1), 0)).reason
    )


def test_the_operator_can_allow_a_user_more() -> None:
    world = World(grant=[{"uid": 4321, "max_value": 1000, "max_min": "10"}])
    account = world.player(uid=4321).open("a", 1000, min=10)
    answer = account.player.answer(account.player.say(SetLimits(account.number, Limits(1001))))
    assert isinstance(answer, Refused) and answer.kind == 5
    answer = account.player.answer(account.player.say(SetLimits(account.number, Limits(900, max=50))))
    assert isinstance(answer, Done)
    assert (world.account("a").value, world.account("a").max) == (900, 50)


def test_the_configuration_goes_over_what_a_process_wants() -> None:
    world = World(limits=[{"name": "a", "max": 50}, {"name": "class 7", "weight": 2.0, "device": "HOST"}])
    account = world.player().open("a", 7, min=60, high=80)
    assert account.limits == Limits(7, min=50, low=0, high=50, max=50, weight=2.0)
    assert world.player().open("b", 8).limits == Limits(8)


def test_a_tenant_cannot_undo_what_the_operator_has_set() -> None:
    world = World(limits=[{"name": "a", "max": 50}])
    account = world.player().open("a")
    account.player.say(SetLimits(account.number, Limits(0, max=80, high=20)))
    assert (world.account("a").max, world.account("a").high) == (50, 20)


def test_the_operator_sets_limits_and_the_tenant_is_told() -> None:
    world = World()
    account = world.player().open("a", 5)
    other = world.player().open("b", 5)
    assert world.broker.set_limits(None, "a", max="40", weight=3) == 1
    world.deliver()
    assert account.player.take(Set) == [Set(account.number, "class 5", Limits(5, 0, 0, UNLIMITED, 40, 3.0))]
    assert other.player.take(Set) == []
    assert world.player().open("a").limits.max == 40, "and those to come"
    assert world.broker.set_limits(None, f"a/{account.player.process.pid}", max=None) == 1
    assert world.broker.events(0)[-1].kind == "limit"


def test_limits_that_cannot_be_are_refused_and_change_nothing() -> None:
    world = World()
    world.player().open("a")
    for bad, words in (
        ({"max": 10, "min": 20}, "above max"),
        ({"min": -1}, "not a size"),
        ({"max": "much"}, "not a size"),
        ({"weight": 0}, "weight must be"),
        ({"colour": 1}, "no limit 'colour'"),
        ({}, "no limit is given"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            world.broker.set_limits(None, "a", **bad)
    with pytest.raises(AdmissionError):
        world.broker.set_limits(None, "a", min=200)
    with pytest.raises(InvalidArgument, match="no account or class 'x'; there are a/1"):
        world.broker.set_limits(None, "x", max=1)
    with pytest.raises(InvalidArgument, match="no device 'GPU-9'; there are HOST"):
        world.broker.set_limits("GPU-9", "a", max=1)
    assert (world.account("a").max, world.account("a").min) == (None, 0)
    assert world.player().open("a").limits == Limits(0)


def test_an_account_moves_to_another_class_and_so_does_what_it_waits_for() -> None:
    world = World()
    holder, low, high = (
        world.player().open(name, value) for name, value in (("h", 500), ("l", 0), ("g", 100))
    )
    holder.get(100)
    first, second = high.demand(10), low.demand(10)
    assert world.broker.set_priority("l", "serving") == 1
    holder.put(10)
    assert low.granted(second) == 10
    assert high.waits(first)
    assert (world.account("l").priority, world.account("l").value) == ("serving", 1000)
    assert world.broker.set_priority("l", 7) == 1
    assert (world.account("l").priority, world.account("l").value) == ("7", 7)


def test_what_waits_beyond_a_lowered_max_is_denied() -> None:
    world = World()
    holder, waiting = world.player().open("h", 100), world.player().open("w")
    holder.get(100)
    number = waiting.demand(50)
    world.broker.set_limits(None, "w", max=40)
    world.deliver()
    assert "of its max 40 B" in waiting.denied(number).reason


def test_a_new_configuration_is_taken_by_those_who_are_there() -> None:
    world = World()
    account = world.player().open("a")
    account.get(80)
    world.broker.configure(
        parse({"device": {"HOST": {"capacity": 60, "reserve": [0, 0]}}, "limits": [{"name": "a", "low": 5}]})
    )
    world.deliver()
    assert (world.device().capacity, world.account("a").low) == (60, 5)
    assert account.asked() == [(20, 0)]


def run(world: World, reclaim: Awaitable[T], script: list[object]) -> T:
    """Runs an operator's call, and between its waits the functions of a script."""

    async def play() -> T:
        task = asyncio.ensure_future(reclaim)
        await asyncio.sleep(0)
        for step in script:
            world.deliver()
            step()  # type: ignore[operator]
            await asyncio.sleep(0)
        return await asyncio.wait_for(task, 5)

    return asyncio.run(play())


def give(account: Account, bytes: int) -> None:
    ((number, _, _),) = account.asks()
    account.give(number, bytes)


def test_the_operator_reclaims_up_every_rung_and_hears_how_much_came() -> None:
    world = World()
    account = world.player().open("a", 1000, rungs=0b10001, min=20)
    account.get(100)
    reclaim = world.broker.reclaim("a", 1000, 10.0)
    assert run(world, reclaim, [lambda: give(account, 30), lambda: give(account, 5)]) == 35
    assert world.lease("a") == 65
    assert {event.demander for event in world.broker.events(0) if event.kind == "yield"} == {"operator"}


def test_a_reclaim_ends_at_its_time_or_with_its_account() -> None:
    world = World()
    account = world.player().open("a")
    account.get(100)
    assert run(world, world.broker.reclaim("a", 50, 1.0), [lambda: world.wait(1.0)]) == 0
    account.give(account.asks()[0][0], 0)
    assert run(world, world.broker.reclaim("a", 50, 9.0), [account.player.die]) == 0
    with pytest.raises(InvalidArgument, match="no account or class 'a'; there are none"):
        asyncio.run(world.broker.reclaim("a", 50, 1.0))
