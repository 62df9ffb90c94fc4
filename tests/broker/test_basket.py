"""Memory between two processes: whose it may become, and that it is never more than what is free."""

from __future__ import annotations

import os

import pytest

from tests.broker.world import Account, Player, World
from torch_elastic_mem.broker import basket
from torch_elastic_mem.broker.basket import MOST_DESCRIPTORS
from torch_elastic_mem.broker.descriptor import Descriptor
from torch_elastic_mem.broker.protocol import HOST, PASS_ON, Grant, Pass, Passed, ProtocolError, Withdraw


def some(count: int) -> list[int]:
    return [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]


def are_open(numbers: list[int]) -> list[bool]:
    return [os.path.exists(f"/proc/self/fd/{number}") for number in numbers]


def pass_on(account: Account, bytes: int, numbers: list[int], ask: int) -> None:
    descriptors = tuple(map(Descriptor, numbers))
    account.player.say(Pass(account.number, len(numbers), bytes, descriptors), ask)


def passed(player: Player) -> list[tuple[int, int]]:
    """Bytes and number of extents that came with grants; they are closed."""
    found = [message for _, message in player.inbox if isinstance(message, Passed)]
    for message in found:
        for descriptor in message.descriptors:
            descriptor.close()
    return [(message.bytes, message.count) for message in found]


def asked(world: World, uid: int = 0) -> tuple[Account, Account, int, int]:
    """A training that holds all, a server that waits for 30 of it, its demand, and the ask for that."""
    training, serving = world.player(uid=uid).open("training"), world.player().open("serving", 100)
    training.get(100)
    number = serving.demand(30)
    ((ask, _, _),) = training.asks()
    return training, serving, number, ask


def test_what_a_victim_passes_on_comes_before_the_grant_of_its_bytes() -> None:
    world = World()
    training, serving, number, ask = asked(world)
    numbers = some(3)
    pass_on(training, 10, numbers, ask)
    assert are_open(numbers) == [True] * 3
    training.give(ask, 30)
    kinds = [type(message) for at, message in serving.player.inbox if at == number]
    assert kinds == [Passed, Grant]
    assert passed(serving.player) == [(10, 3)]
    assert are_open(numbers) == [False] * 3


@pytest.mark.parametrize(("uid", "flags"), [(0, PASS_ON), (1000, 0)])
def test_a_victim_is_told_whether_its_memory_can_be_passed_on(uid: int, flags: int) -> None:
    world = World()
    training = world.player(uid=uid).open("training")
    training.get(100)
    world.player().open("serving", 100).demand(30)
    assert [ask.flags for _, ask in training.player.asks()] == [flags]


def test_nobody_gets_what_another_user_has_passed_on() -> None:
    world = World()
    training, serving, number, ask = asked(world, uid=1000)
    numbers = some(1)
    pass_on(training, 10, numbers, ask)
    training.give(ask, 30)
    assert serving.granted(number) == 30
    assert passed(serving.player) == []
    assert are_open(numbers) == [False]


def test_what_is_passed_on_to_nobody_goes_to_the_device() -> None:
    world = World()
    training = world.player().open("training")
    training.get(100)
    numbers = some(2)
    pass_on(training, 10, numbers, 99)
    training.give(99, 20)
    assert are_open(numbers) == [False] * 2
    assert world.device().free == 20


def test_it_waits_with_the_demand_and_is_never_more_than_what_is_free() -> None:
    world = World()
    training, serving, number, ask = asked(world)
    numbers = some(2)
    pass_on(training, 10, numbers, ask)
    training.give(ask, 20, last=False)
    assert serving.waits(number)
    assert are_open(numbers) == [True] * 2
    # Somebody of a higher class is granted 15 of the 20 that are free meanwhile.
    urgent = world.player().open("urgent", 1000)
    assert urgent.get(15) == 15
    assert passed(urgent.player) == [(10, 1)]
    assert are_open(numbers) == [False] * 2, "the other does not fit into the 5 that are left"


def test_what_a_demand_does_not_take_any_more_goes_to_the_device() -> None:
    world = World()
    training, serving, number, ask = asked(world)
    numbers = some(2)
    pass_on(training, 10, numbers, ask)
    training.give(ask, 20, last=False)
    serving.player.say(Withdraw(), number)
    assert are_open(numbers) == [False] * 2


@pytest.mark.parametrize("end", ["lose", "leave"])
def test_what_is_offered_and_not_given_goes_with_the_connection(end: str) -> None:
    world = World()
    training, _, _, ask = asked(world)
    numbers = some(2)
    pass_on(training, 10, numbers, ask)
    getattr(training.player, end)()
    assert are_open(numbers) == [False] * 2


def test_extents_that_do_not_fit_a_grant_stay_with_the_device() -> None:
    world = World()
    training, serving, number, ask = asked(world)
    numbers = some(2)
    pass_on(training, 20, numbers, ask)
    training.give(ask, 40)
    assert serving.granted(number) == 30
    assert passed(serving.player) == [(20, 1)]
    assert are_open(numbers) == [False] * 2


def test_who_passes_on_without_end_is_not_listened_to() -> None:
    world = World()
    training, _, _, ask = asked(world)
    numbers = some(MOST_DESCRIPTORS + 1)
    with pytest.raises(ProtocolError, match="more than 253"):
        pass_on(training, 1, numbers, ask)
    assert not any(are_open(numbers))


def test_an_extent_has_bytes() -> None:
    world = World()
    training, _, _, ask = asked(world)
    numbers = some(2)
    with pytest.raises(ProtocolError, match="no bytes"):
        pass_on(training, 0, numbers, ask)
    assert are_open(numbers) == [False] * 2


def test_what_is_more_than_the_bytes_that_are_given_goes_to_the_device() -> None:
    world = World()
    training, serving, number, ask = asked(world)
    training.give(ask, 10, last=False)
    numbers = some(2)
    pass_on(training, 10, numbers, ask)
    training.give(ask, 15, last=False)
    assert serving.waits(number)
    assert are_open(numbers) == [True, False]


def test_what_is_offered_waits_for_the_answer_of_its_number() -> None:
    world = World()
    training, serving, number, ask = asked(world)
    numbers = some(3)
    pass_on(training, 10, numbers, ask)
    training.give(99, 0)
    assert are_open(numbers) == [True] * 3
    training.give(ask, 30)
    assert serving.granted(number) == 30
    assert passed(serving.player) == [(10, 3)]


def test_no_more_extents_are_kept_than_a_few_demands_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basket, "MOST_KEPT", 150)
    world = World(1000)
    training, serving = world.player().open("training"), world.player().open("serving", 100)
    training.get(1000)
    number = serving.demand(1000)
    ((ask, _, _),) = training.asks()
    numbers = [some(100) for _ in range(3)]
    for each in numbers:
        pass_on(training, 1, each, ask)
        training.give(ask, 100, last=False)
    assert serving.waits(number)
    # Whose extents are the oldest has no say over what others pass on.
    assert are_open(numbers[0] + numbers[1]) == [False] * 150 + [True] * 50
    assert are_open(numbers[2]) == [True] * 100


def test_an_account_of_another_connection_is_no_ones_to_pass_on() -> None:
    world = World()
    training, serving, _, _ = asked(world)
    numbers = some(1)
    with pytest.raises(ProtocolError, match="none of this connection's"):
        serving.player.say(Pass(training.number, 1, 10, tuple(map(Descriptor, numbers))))
    assert are_open(numbers) == [False]


def test_what_is_between_two_holders_is_not_outside_memory() -> None:
    world = World()
    training, serving, number, ask = asked(world)
    pass_on(training, 10, some(2), ask)
    training.give(ask, 20, last=False)
    world.look(HOST, 100, 100)
    assert world.device().outside == 0
    assert serving.waits(number)
