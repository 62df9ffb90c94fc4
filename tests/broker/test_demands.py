"""Demands: what is granted at once, who is asked for the rest, and what is denied in which words."""

from __future__ import annotations

import pytest

from tests.broker.world import Account, World
from torch_elastic_mem.broker.device_view import Reading
from torch_elastic_mem.broker.protocol import CLOSED, FREE_ONLY, OUT_OF_MEMORY, Denied, Done, Grant, Refused


def two(world: World, low: int = 0, high: int = 100) -> tuple[Account, Account]:
    return world.player().open("training", low), world.player().open("serving", high)


def test_what_is_free_is_granted_at_once() -> None:
    world = World()
    training, _ = two(world)
    assert training.get(40) == 40
    assert (world.device().leased, world.device().free) == (40, 60)


def test_a_wish_for_more_is_met_as_far_as_memory_is_free_above_the_upper_mark() -> None:
    world = World(reserve=(5, 20))
    training, _ = two(world)
    assert training.get(10, want=200) == 80
    assert world.device().free == 15


def test_a_wish_for_more_stays_below_max_and_takes_whole_granules() -> None:
    world = World()
    account = world.player().open("a", max=50)
    assert account.get(10, want=90) == 50
    player = world.player()
    player.session.granularity = 8
    assert player.open("b").get(10, want=49) == 10 + 32


def test_a_higher_class_is_given_what_a_lower_one_yields() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    number = serving.demand(30)
    assert serving.waits(number)
    asks = training.player.asks()
    assert [(ask.bytes, ask.rung, ask.demander) for _, ask in asks] == [(30, 0, "serving/2")]
    training.give(asks[0][0], 30)
    assert serving.granted(number) == 30
    assert world.account("training").given == 30
    assert world.broker.events(0)[-2].kind == "yield"


def test_all_victims_of_a_plan_are_asked_at_once() -> None:
    world = World()
    first, second, serving = (
        world.player().open(name, value) for name, value in (("a", 0), ("b", 50), ("s", 100))
    )
    first.get(50)
    second.get(50)
    number = serving.demand(70)
    assert first.asked() == [(50, 0)]
    assert second.asked() == [(20, 0)]
    assert serving.waits(number)


def test_a_victim_with_less_is_not_asked_again_at_that_rung_and_dearer_rungs_follow() -> None:
    world = World()
    training, serving = two(world)
    training.report(rungs=0b1010)
    training.get(100)
    number = serving.demand(30)
    for given, rung in ((10, 0), (5, 1), (5, 3)):
        (ask,) = training.asks()
        assert ask[2] == rung
        training.give(ask[0], given)
    assert training.asks() == [], "it has no reclaimer for a pause"
    assert serving.waits(number)
    world.wait(0.2)
    assert training.asked() == [(10, 0)], "after a rest it may have something again"


def test_nobody_is_asked_above_the_rung_of_the_demand() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    serving.demand(30, rung=1)
    for rung in (0, 1):
        (ask,) = training.asks()
        assert ask[2] == rung
        training.give(ask[0], 0)
    assert training.asks() == []


def test_a_brief_demand_for_what_is_cheap_keeps_nothing_from_who_needs_it_where_nobody_has_it() -> None:
    world = World()
    above, below = two(world, 100, 100)
    above.get(60)
    below.get(25)
    patient = above.demand(20, rung=1, timeout=5.0)
    world.wait(0.01)
    assert above.waits(patient), "it may ask again"
    above.withdraw(patient)
    brief = above.demand(20, rung=1, timeout=0.05)
    world.wait(0.01)
    assert "others were asked up to 'evict'" in above.denied(brief).reason
    assert below.get(5) == 5


def test_only_free_memory_counts_where_the_demand_says_so() -> None:
    world = World()
    training, serving = two(world)
    training.get(90)
    assert serving.get(10, rung=FREE_ONLY) == 10
    denied = serving.denied(serving.demand(1, rung=FREE_ONLY))
    assert "only free memory counted" in denied.reason
    assert training.asks() == []


def test_at_its_deadline_a_demand_is_denied_in_words_and_nobody_is_asked_any_more() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    number = serving.demand(30, timeout=1.0)
    training.asks()
    world.wait(1.0)
    denied = serving.denied(number)
    assert denied.kind == OUT_OF_MEMORY
    assert denied.reason == (
        "account 'serving/2' asks for 30 B; 0 B of 100 B on HOST is free after 1 s, others were asked up to "
        "'pause' (training/1 holds 100 B; serving/2 holds 0 B); wait longer, allow a dearer rung, or lower "
        "what another account may hold"
    )
    world.wait(5.0)
    assert training.asks() == []
    assert world.device().queued == 0


def test_what_is_on_its_way_is_not_asked_for_twice() -> None:
    world = World()
    training, serving = two(world)
    other = world.player().open("other", 100)
    training.get(100)
    first, second = serving.demand(30), other.demand(20)
    assert training.asked() == [(30, 0), (20, 0)]
    training.put(50)
    assert (serving.granted(first), other.granted(second)) == (30, 20)
    assert training.asks() == []


def test_bytes_behind_fences_are_waited_for_until_half_of_the_time() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    serving.demand(30, timeout=4.0)
    ((number, _, _),) = training.asks()
    training.give(number, 10, coming=20)
    world.wait(1.9)
    assert training.asks() == []
    world.wait(0.2)
    assert training.asked() == [(20, 0)], "it is not exhausted: all of it was promised"


def test_a_return_of_what_was_coming_meets_the_demand() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    number = serving.demand(30)
    ((ask, _, _),) = training.asks()
    training.give(ask, 10, coming=20, last=True)
    training.put(20)
    assert serving.granted(number) == 30
    assert world.account("training").given == 30


def test_a_demand_that_waits_is_served_before_later_ones_of_its_class_and_below() -> None:
    world = World()
    training, serving = two(world)
    late = world.player().open("late", 100)
    training.get(100)
    first = serving.demand(30)
    second, third = late.demand(10), training.demand(5)
    training.put(20)
    assert serving.waits(first) and late.waits(second) and training.denied(third)
    training.put(10)
    assert serving.granted(first) == 30
    assert late.waits(second)


def test_the_own_account_is_not_asked() -> None:
    world = World()
    training, _ = two(world)
    training.get(60)
    number = training.demand(30, rung=4)
    assert training.granted(number) == 30
    assert training.asks() == []


def test_more_than_max_or_the_device_is_denied_at_once_in_words() -> None:
    world = World()
    account = world.player().open("a", max=50)
    account.get(30)
    assert (
        "holds 30 B of its max 50 B; free some of its own, or raise its max"
        in account.denied(account.demand(30)).reason
    )
    other = world.player().open("b")
    assert (
        "can have 100 B of HOST (a/1 holds 30 B, max 50 B; b/2 holds 0 B); ask for less"
        in other.denied(other.demand(101)).reason
    )
    assert other.denied(other.demand(2**64 - 1))


def test_memory_between_the_marks_is_for_classes_above_the_lowest_that_holds_some() -> None:
    world = World(reserve=(5, 20))
    training, serving = two(world)
    assert training.get(80) == 80
    assert training.denied(training.demand(1, rung=FREE_ONLY))
    assert serving.get(15, rung=FREE_ONLY) == 15
    assert serving.denied(serving.demand(1, rung=FREE_ONLY)), "what is below the lower mark is nobody's"


def test_a_guaranteed_min_is_met_from_between_the_marks_too() -> None:
    world = World(reserve=(5, 20))
    account = world.player().open("a", min=90)
    assert account.get(90) == 90


def test_the_background_keeps_the_upper_mark_free_from_lower_classes_up_to_evict() -> None:
    world = World(reserve=(5, 20))
    training, serving = two(world)
    training.get(80)
    serving.get(10)
    for rung in (0, 1):
        (ask,) = training.player.asks()
        assert (ask[1].bytes, ask[1].rung, ask[1].demander) == (10, rung, "reserve")
        training.give(ask[0], 0)
    assert training.asks() == []
    world.wait(0.15)
    ((number, bytes, _),) = training.asks()
    training.give(number, bytes)
    assert world.device().free == 15
    world.wait(60)
    assert training.asks() == []


def test_the_background_disturbs_nobody_where_there_is_one_class() -> None:
    world = World(reserve=(5, 20))
    first, second = two(world, 100, 100)
    first.get(40)
    second.get(40)
    first.denied(first.demand(1, rung=FREE_ONLY))
    world.wait(60)
    assert first.asks() == second.asks() == []


def test_a_withdrawn_demand_is_answered_once() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    number = serving.demand(30)
    serving.withdraw(number)
    assert "has withdrawn it" in serving.denied(number).reason
    serving.withdraw(number)
    training.put(50)
    assert serving.denied(number)
    done = serving.demand(10)
    serving.withdraw(done)
    assert serving.granted(done) == 10


def test_closing_denies_what_waits_and_is_refused_while_there_is_lease() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    number = serving.demand(30)
    assert isinstance(serving.player.answer(serving.close()), Done)
    assert serving.denied(number).kind == CLOSED
    refused = training.player.answer(training.close())
    assert isinstance(refused, Refused) and refused.kind == 7
    assert "still holds a lease of 100 B; return it first" in refused.reason


def test_every_grant_and_denial_is_counted_and_noted() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    serving.demand(200)
    state = world.broker.state()
    assert (state.grants, state.denials, state.clients) == (1, 1, 2)
    assert [event.kind for event in world.broker.events(0)] == ["join", "join", "grant", "deny"]
    assert [event.seq for event in world.broker.events(2)] == [3, 4]


def test_pressure_is_the_part_of_the_last_ten_seconds_that_a_class_waited() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    serving.demand(30, timeout=2.0)
    world.wait(4.0)
    assert round(world.device().pressure["class 100"], 6) == 0.2
    world.wait(20.0)
    assert world.device().pressure == {}


def test_a_demand_of_one_device_does_not_touch_another() -> None:
    world = World()
    on_host = world.player().open("a", 0)
    on_gpu = world.player(device="GPU-1").open("a", 100)
    on_host.get(100)
    assert on_gpu.get(100) == 100
    assert on_host.asks() == []


def test_demands_of_a_group_are_granted_together() -> None:
    world = World()
    first = world.player(device="GPU-1").open("a")
    second = world.player(device="GPU-2").open("a")
    holder = world.player(device="GPU-2").open("holder", 100)
    holder.get(80)
    one = first.demand(50, group="g", members=2, round=1)
    assert first.waits(one) and world.lease("a", "GPU-1") == 50
    two = second.demand(50, group="g", members=2, round=1)
    assert first.waits(one) and second.waits(two)
    holder.put(30)
    assert first.granted(one) == second.granted(two) == 50


def test_a_member_that_is_denied_takes_the_group_with_it_and_late_ones_too() -> None:
    world = World()
    first = world.player(device="GPU-1").open("a")
    second = world.player(device="GPU-2").open("a")
    third = world.player().open("a")
    waiting = world.player(device="GPU-1").open("waiting")
    one = first.demand(60, group="g", members=3, round=1)
    other = waiting.demand(50)
    two = second.demand(101, group="g", members=3, round=1)
    assert "another member of group 'g', a/2, did not get" in first.denied(one).reason
    assert second.denied(two)
    assert third.denied(third.demand(1, group="g", members=3, round=1))
    assert waiting.granted(other) == 50, "what was prepared is free for others at once"
    again = [each.demand(1, group="g", members=3, round=2) for each in (first, second, third)]
    assert [each.granted(number) for each, number in zip((first, second, third), again, strict=True)] == [
        1,
        1,
        1,
    ]


def test_a_group_of_another_user_is_another_group() -> None:
    world = World(grant=[{"uid": 5}])
    first, second = world.player(uid=0).open("a"), world.player(uid=5).open("b")
    one = first.demand(10, group="g", members=2, timeout=1.0)
    two = second.demand(10, group="g", members=2, timeout=1.0)
    assert first.waits(one) and second.waits(two)
    world.wait(1.0)
    assert isinstance(first.player.answer(one), Denied) and isinstance(second.player.answer(two), Denied)


def test_a_round_that_has_all_its_members_takes_no_more() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    serving.demand(10, group="g", members=1)
    denied = serving.denied(serving.demand(0, group="g", members=1))
    assert "has its 1 members in round 0" in denied.reason


def test_a_member_that_dies_undoes_the_group() -> None:
    world = World()
    first, second = world.player(device="GPU-1").open("a"), world.player(device="GPU-2").open("b")
    one = first.demand(10, group="g", members=3)
    second.demand(10, group="g", members=3)
    second.player.die()
    assert first.denied(one)
    assert world.lease("a", "GPU-1") == 0


@pytest.mark.parametrize("seen", [False, True])
def test_in_the_grace_after_a_crash_demands_wait_for_tenants_to_come_back(seen: bool) -> None:
    world = World(grace=0.5)
    if seen:  # of a limit far below what the device has
        world.view.readings["GPU-1"] = Reading(1000, 80)
    early = world.player(device="GPU-1").open("early")
    number = early.demand(30, rung=FREE_ONLY)
    assert early.waits(number)
    world.player(device="GPU-1").open("back", lease=80)
    world.wait(0.6)
    assert isinstance(early.player.answer(number), Denied)
    assert isinstance(early.player.answer(early.demand(20)), Grant)


def test_one_account_can_have_only_so_many_demands_waiting() -> None:
    world = World()
    training, serving = two(world)
    training.get(100)
    numbers = [serving.demand(1, rung=0, timeout=60.0) for _ in range(129)]
    assert "128 of its demands wait already" in serving.denied(numbers[-1]).reason
