"""Processes that are late, stop, die and come back, and devices that others use too."""

from __future__ import annotations

import pytest

from tests.broker.world import Account, World
from torch_elastic_mem.broker.protocol import Denied, Grant, Limits, Open, ProtocolError, Refused
from torch_elastic_mem.broker.session import Process


def full(world: World, device: str = "HOST") -> tuple[Account, Account]:
    training = world.player(device=device).open("training", 0)
    serving = world.player(device=device).open("serving", 100)
    assert training.get(100) == 100
    return training, serving


def test_who_does_not_answer_in_time_is_a_debtor_and_is_granted_nothing() -> None:
    world = World()
    training, serving = full(world)
    number = serving.demand(30, timeout=2.0)
    ((ask, _, _),) = training.asks()
    assert world.account("training").state == "asked"
    world.wait(1.0)
    assert (world.account("training").state, world.account("training").owed) == ("debtor", 30)
    training.put(5)
    denied = training.denied(training.demand(1))
    assert (
        "was asked for 30 B and has not answered in time; it is granted nothing until it has" in denied.reason
    )
    training.give(ask, 30)
    assert serving.granted(number) == 30
    assert world.account("training").state == "ok"
    assert training.get(1) == 1


def test_a_debt_counts_for_the_whole_process_and_what_it_waits_for_is_denied() -> None:
    world = World()
    training, serving = full(world)
    elsewhere = world.player(process=training.player.process, device="GPU-1").open("training")
    blocker = world.player(device="GPU-1").open("blocker", 100)
    blocker.get(100)
    waiting = elsewhere.demand(10)
    serving.demand(30, timeout=2.0)
    world.wait(1.5)
    assert "has not answered in time" in elsewhere.denied(waiting).reason


def test_others_are_served_from_elsewhere_than_from_a_debtor() -> None:
    world = World()
    stopped, other = world.player().open("stopped", 0), world.player().open("other", 50)
    serving = world.player().open("serving", 100)
    stopped.get(50)
    other.get(50)
    number = serving.demand(30, timeout=4.0)
    assert stopped.asked() == [(30, 0)]
    world.wait(2.0)
    assert other.give_what_is_asked() == 30
    assert serving.granted(number) == 30
    again = serving.demand(10)
    assert stopped.asks() == []
    assert other.asked() == [(10, 0)]
    assert serving.waits(again)


def test_a_late_answer_that_is_not_the_last_leaves_the_debt() -> None:
    world = World()
    training, serving = full(world)
    serving.demand(30, timeout=2.0)
    ((ask, _, _),) = training.asks()
    world.wait(1.5)
    training.give(ask, 10, last=False)
    assert world.account("training").state == "debtor"
    training.give(ask, 0)
    assert world.account("training").state == "ok"


def test_after_bye_nothing_is_held() -> None:
    world = World()
    training, serving = full(world)
    number = serving.demand(30)
    training.player.leave()
    assert serving.granted(number) == 30
    assert [event.kind for event in world.broker.events(0)][-2:] == ["leave", "grant"]


def test_the_bytes_of_a_lost_connection_stay_leased_and_are_not_asked_for() -> None:
    world = World()
    training, serving = full(world)
    training.player.asks()
    training.player.lose()
    number = serving.demand(30, timeout=1.0)
    world.wait(2.0)
    assert isinstance(serving.player.answer(number), Denied)
    assert (world.account("training").state, world.lease("training")) == ("lost", 100)


def test_host_memory_of_a_dead_process_is_free_at_once() -> None:
    world = World()
    training, serving = full(world)
    number = serving.demand(30)
    training.player.die()
    assert serving.granted(number) == 30
    assert [account.name for account in world.device().accounts] == ["serving"]


def test_memory_of_a_dead_process_that_cannot_be_seen_is_free_after_a_second() -> None:
    world = World()
    training, serving = full(world, "GPU-1")
    number = serving.demand(30)
    training.player.die()
    assert serving.waits(number)
    assert world.account("training", "GPU-1").state == "dying"
    world.wait(0.9)
    assert serving.waits(number)
    world.wait(0.2)
    assert serving.granted(number) == 30


def test_memory_of_a_dead_process_is_free_when_the_device_shows_the_drop() -> None:
    world = World()
    training, serving = full(world, "GPU-1")
    world.look("GPU-1", 100, 100)
    number = serving.demand(30)
    training.player.die()
    world.look("GPU-1", 100, 60)
    assert serving.waits(number)
    world.look("GPU-1", 100, 0)
    assert serving.granted(number) == 30


def test_memory_of_a_dead_process_is_free_when_the_device_knows_it_no_more() -> None:
    world = World()
    training, serving = full(world, "GPU-1")
    pid = training.player.process.pid
    world.look("GPU-1", 120, 110, {pid: 100, 99: 10})
    training.player.die()
    world.look("GPU-1", 120, 110, {pid: 100, 99: 10})
    assert world.account("training", "GPU-1").state == "dying"
    world.look("GPU-1", 120, 10, {99: 10})
    assert serving.get(30) == 30


def test_a_dead_process_owes_nothing_and_its_demands_are_gone() -> None:
    world = World()
    training, serving = full(world)
    waiting = training.player.open("more", 1000)
    number = waiting.demand(10)
    serving.demand(30, timeout=0.5)
    training.player.die()
    assert waiting.waits(number)
    assert serving.player.process.debts == 0
    world.wait(1.0)
    assert training.player.process.debts == 0
    assert world.device().queued == 0


def test_a_process_that_comes_back_replaces_what_was_lost() -> None:
    world = World()
    training, _ = full(world)
    training.player.lose()
    training.player.connect()
    again = training.player.open("training", 0, lease=70)
    assert world.lease("training") == 70
    assert len(world.device().accounts) == 2
    again.put(70)


def test_a_process_cannot_come_back_with_more_than_it_was_granted() -> None:
    world = World()
    training, _ = full(world)
    training.player.lose()
    training.player.connect()
    refused = training.player.refusal(Open("training", "c", Limits(0), 101))
    assert "comes back with a lease of 101 bytes; it was granted 100" in refused.reason


def test_another_process_of_that_number_does_not_get_what_was_lost() -> None:
    world = World()
    training, _ = full(world)
    training.player.lose()
    other = world.player(Process(training.player.process.pid, 0, 2000))
    other.open("training")
    assert sorted(account.lease for account in world.device().accounts) == [0, 0, 100]


def test_a_new_broker_charges_what_tenants_hold_even_where_it_does_not_fit() -> None:
    world = World()
    low = world.player().open("low", 0, lease=70)
    high = world.player().open("high", 100, lease=60)
    assert world.device().leased == 130
    assert (low.asked(), high.asked()) == ([(30, 0)], []), "the lowest class brings it back under"
    other = world.player().open("other", 1000)
    assert isinstance(other.player.answer(other.demand(1, rung=255)), Denied)


def test_a_min_that_does_not_fit_is_let_go_of_where_memory_is_held_already() -> None:
    world = World()
    world.player().open("a", min=80)
    back = world.player().open("b", lease=10, min=30)
    assert back.limits.min == 0
    assert world.lease("b") == 10


def test_a_stranger_that_is_younger_than_the_broker_holds_nothing_from_before() -> None:
    world = World(grant=[{"uid": 5}])
    young = world.player(Process(77, 5, 1000))
    assert "which this broker has not granted" in young.refusal(Open("a", "c", Limits(0), 10)).reason
    old = world.player(Process(78, 5, 400))
    assert old.open("a", lease=10)
    assert "has not granted" in old.refusal(Open("b", "c", Limits(0), 2**50)).reason


def test_giving_more_than_was_granted_ends_the_connection() -> None:
    world = World()
    account = world.player().open("a")
    account.get(10)
    with pytest.raises(ProtocolError, match="gives back 11 B but holds 10 B"):
        account.put(11)
    assert world.lease("a") == 10


def test_the_account_of_another_connection_is_none_of_its() -> None:
    world = World()
    account = world.player().open("a")
    account.player = world.player()
    with pytest.raises(ProtocolError, match="none of this connection's"):
        account.put(0)


def test_what_others_hold_on_the_device_is_not_shared_out() -> None:
    world = World()
    account = world.player(device="GPU-1").open("a")
    account.get(40)
    world.look("GPU-1", 100, 70)
    assert (world.device("GPU-1").outside, world.device("GPU-1").capacity) == (30, 70)
    assert account.denied(account.demand(31))
    assert account.get(30) == 30


def test_a_device_that_fills_up_from_outside_makes_the_lowest_class_shrink() -> None:
    world = World()
    training, serving = full(world, "GPU-1")
    world.look("GPU-1", 100, 100)
    world.look("GPU-1", 100, 120)
    assert training.asked() == [(20, 0)]
    assert serving.asks() == []


def test_one_look_between_a_grant_and_its_memory_does_not_hide_what_is_outside() -> None:
    world = World()
    account = world.player(device="GPU-1").open("a")
    world.look("GPU-1", 100, 30)
    account.get(50)
    world.look("GPU-1", 100, 30)
    assert world.device("GPU-1").capacity == 70
    for _ in range(20):
        world.look("GPU-1", 100, 50)
    assert world.device("GPU-1").capacity == 100


def test_a_tenant_that_comes_back_was_not_outside() -> None:
    world = World()
    world.player(device="GPU-1").open("a")
    world.look("GPU-1", 100, 60)
    back = world.player(device="GPU-1").open("b", lease=50)
    world.look("GPU-1", 100, 60)
    assert world.device("GPU-1").outside == 10
    assert back.asks() == []


def test_a_refused_account_is_refused_in_words() -> None:
    world = World()
    account = world.player().open("a", min=60)
    refused = account.player.refusal(Open("b", "c", Limits(0, min=50), 0))
    assert refused.kind == 2 and "40 B of 100 B is not promised yet" in refused.reason
    assert "names are unique" in account.player.refusal(Open("a", "c", Limits(0), 0)).reason
    assert isinstance(account.player.refusal(Open("", "c", Limits(0), 0)), Refused)
    assert isinstance(account.player.answer(account.demand(60)), Grant)
