"""Accounts of one class: what they take from each other, and what each keeps."""

from __future__ import annotations

from tests.broker.world import Account, World


def two(world: World) -> tuple[Account, Account]:
    return world.player().open("first", 100), world.player().open("second", 100)


def test_who_has_just_yielded_to_a_peer_does_not_take_it_back_at_once() -> None:
    world = World()
    first, second = two(world)
    first.get(100)
    number = second.demand(60)
    ((ask, _, _),) = first.asks()
    first.give(ask, 60)
    assert second.granted(number) == 60
    back = first.demand(10)
    world.wait(0.05)
    assert first.waits(back) and second.asks() == []
    world.wait(0.1)
    assert second.asked() == [(10, 0)], "later it may have its share again"


def test_what_a_peer_keeps_warm_is_lent_beyond_a_share_and_what_it_uses_is_not() -> None:
    world = World()
    first, second = two(world)
    first.get(50)
    first.report(rungs=0b01010)  # evict and shrink
    second.get(50)
    number = second.demand(20)
    for rung, given in ((0, 0), (1, 5)):
        ((ask, bytes, at),) = first.asks()
        assert (bytes, at) == (20, rung)
        first.give(ask, given)
    assert first.asks() == [], "its share protects what requests use"
    assert second.waits(number)


def test_a_peer_is_asked_to_pause_only_for_one_that_has_less_than_half_of_its_share() -> None:
    for held, rungs in ((30, [3]), (20, [3, 4])):
        world = World()
        first, second = two(world)
        first.get(100 - held)
        first.report(rungs=0b11000)  # shrink and pause
        second.get(held)
        second.demand(10)
        seen = []
        while asks := first.asks():
            ((ask, _, rung),) = asks
            seen.append(rung)
            first.give(ask, 0)
        assert [rung for rung in seen if rung] == rungs
