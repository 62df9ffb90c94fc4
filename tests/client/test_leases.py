"""How leases come from a broker, are used, and go back."""

from __future__ import annotations

import threading

import pytest
import torch

import torch_elastic_mem as tem
from tests.client.conftest import Opened
from tests.client.scripted import MiB, Scripted
from tests.rungs import Rung
from torch_elastic_mem.broker.protocol import (
    EVICT,
    FREE_ONLY,
    OUT_OF_MEMORY,
    PAUSE,
    TRIM,
    Bye,
    Close,
    Demand,
    Denied,
    Grant,
    Hello,
    Limits,
    Message,
    Open,
    Return,
    Withdraw,
)

KEPT = 64 * MiB  # of an unused lease, at most: one extent of the largest size


def test_it_says_who_it_is(arena: tem.Arena, broker: Scripted) -> None:
    (hello,) = broker.got(Hello)
    assert hello.backend == arena.backend
    assert hello.device == ("HOST" if arena.backend == "host" else arena.uuid)
    assert hello.total >= 64 * MiB
    assert arena.broker == broker.path == arena.snapshot().broker


def test_an_account_is_opened_with_its_class_and_limits(opened: Opened, broker: Scripted) -> None:
    account, _ = opened("ft", "serving", low="4MiB", max="32MiB", weight=2.0)
    (open_message,) = broker.got(Open)
    assert (open_message.name, open_message.priority, open_message.lease) == ("ft", "serving", 0)
    assert open_message.limits == Limits(1000, low=4 * MiB, max=32 * MiB, weight=2.0)
    assert account.limits.max == 32 * MiB


def test_limits_that_the_operator_has_set_are_in_force(opened: Opened, broker: Scripted) -> None:
    broker.limits = Limits(5, max=8 * MiB)
    account, _ = opened()
    assert (account.limits.value, account.limits.max) == (5, 8 * MiB)


def test_growth_is_leased_first_and_held_never_exceeds_the_lease(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = account.range("32MiB")
    memory.grow("10MiB")
    assert account.held == 10 * MiB
    (state,) = arena.snapshot().accounts
    assert state.lease == broker.charged[number] >= 10 * MiB
    assert arena.snapshot().created <= broker.charged[number]


def test_growth_within_the_lease_costs_no_message(opened: Opened, broker: Scripted) -> None:
    account, _ = opened()
    memory = account.range("32MiB")
    memory.grow("2MiB")
    memory.grow("2MiB")
    assert len(broker.got(Demand)) == 1


def test_memory_is_released_before_its_lease_goes_back(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = account.range("32MiB")
    memory.grow("32MiB")
    memory.shrink("32MiB")
    arena.collect()
    broker.await_count(Return, 1)
    assert account.held == 0
    kept = broker.charged[number]
    assert kept <= KEPT  # so that the next small growth costs no message
    assert arena.snapshot().created <= kept


def test_a_denial_is_an_error_in_the_brokers_words_and_changes_nothing(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, _ = opened()
    memory = account.range("256MiB")
    memory.grow("16MiB")
    before = arena.snapshot()
    with pytest.raises(tem.OutOfMemory, match="others hold the rest") as refused:
        memory.grow("80MiB")
    assert "account 'training' asked for 80 MiB beside the 16 MiB it holds" in str(refused.value)
    after = arena.snapshot()
    assert (after.leased, after.created) == (before.leased, before.created)
    assert after.accounts[0].denied == 1


def test_a_demand_says_what_may_be_asked_of_others(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    memory = account.range("8MiB")
    memory.grow("8MiB", timeout=3.0)
    (demand,) = broker.got(Demand)
    assert (demand.account, demand.rung, demand.bytes) == (number, PAUSE, 8 * MiB)
    assert 0 < demand.timeout <= 3_000_000


def test_own_idle_memory_goes_before_others_are_asked(opened: Opened, broker: Scripted) -> None:
    broker.free = 24 * MiB
    account, _ = opened()
    idle = account.range("24MiB", keep="24MiB")
    idle.grow("24MiB")
    idle.shrink("24MiB")
    memory = account.range("24MiB")
    memory.grow("24MiB")
    assert account.held == 24 * MiB
    assert [demand.rung for demand in broker.got(Demand)][1:] == [FREE_ONLY]


def test_what_is_free_is_taken_before_own_idle_memory_goes(opened: Opened, broker: Scripted) -> None:
    account, _ = opened()
    idle = account.range("24MiB", keep="24MiB")
    idle.grow("24MiB")
    idle.shrink("24MiB")
    memory = account.range("16MiB")
    memory.grow("16MiB")
    assert account.held == 40 * MiB


def test_two_threads_that_grow_at_once_get_a_lease_each(opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    ranges = [account.range("8MiB") for _ in range(8)]
    threads = [threading.Thread(target=memory.grow, args=("8MiB",)) for memory in ranges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert account.held == 64 * MiB == broker.charged[number]


def test_a_denial_that_another_threads_grant_has_overtaken_is_not_the_last_word(
    opened: Opened, broker: Scripted
) -> None:
    broker.policy = lambda demand: None
    account, number = opened()
    ranges = [account.range("8MiB") for _ in range(2)]
    threads = [threading.Thread(target=memory.grow, args=("8MiB",)) for memory in ranges]
    for thread in threads:
        thread.start()
    broker.await_count(Demand, 2)
    first, second = (request for request, message in broker.log if isinstance(message, Demand))
    broker.policy = broker.grant_what_is_free
    broker.charged[number] += 10 * MiB
    broker.send(first, Grant(number, 10 * MiB))
    broker.send(second, Denied(OUT_OF_MEMORY, "6 MiB are free"))
    for thread in threads:
        thread.join(10)
    assert account.held == 16 * MiB
    assert broker.got(Demand)[-1].bytes == 6 * MiB


def test_a_broker_that_does_not_answer_is_given_up_on(opened: Opened, broker: Scripted) -> None:
    broker.policy = lambda demand: None
    account, number = opened()
    memory = account.range("8MiB")
    with pytest.raises(tem.OutOfMemory, match="does not answer"):
        memory.grow("8MiB", timeout=0.1)
    broker.await_count(Withdraw, 1)
    # What comes too late is nobody's, and goes back.
    broker.answer(Grant(number, 80 * MiB))
    broker.await_count(Return, 1)
    assert account.held == 0


def test_waiting_for_room_gets_the_lease_when_it_is_there(opened: Opened, broker: Scripted) -> None:
    broker.free = 0
    account, _ = opened()
    assert not account.wait("8MiB", timeout=0.05)
    broker.free = 64 * MiB
    assert account.wait("8MiB", timeout=5)
    assert {demand.rung for demand in broker.got(Demand)} == {FREE_ONLY}
    account.range("8MiB").grow("8MiB")


def test_a_group_is_named_in_the_demand_and_the_growth_after_it_costs_none(
    opened: Opened, broker: Scripted
) -> None:
    account, _ = opened()
    memory = account.range("8MiB")
    with account.reserve("8MiB", group=tem.Group("tp", 2, round=7)):
        assert account.held == 8 * MiB
        memory.grow("8MiB")
    (demand,) = broker.got(Demand)
    assert (demand.group, demand.members, demand.round) == ("tp", 2, 7)
    assert account.held == 8 * MiB


def test_a_reservation_asks_others_no_dearer_than_it_says(opened: Opened, broker: Scripted) -> None:
    account, _ = opened()
    account.reserve("8MiB", group=tem.Group("tp", 2), rung="evict")
    account.reserve("8MiB", group=tem.Group("tp", 2, round=1))
    assert [demand.rung for demand in broker.got(Demand)] == [EVICT, PAUSE]
    with pytest.raises(tem.InvalidArgument, match="unknown rung"):
        account.reserve("8MiB", rung="never")


def test_a_member_of_a_group_gives_its_unused_lease_back_before_it_asks_for_all(
    opened: Opened, broker: Scripted
) -> None:
    account, number = opened(max="8MiB")
    memory = account.range("8MiB", extent="2MiB")
    memory.grow("8MiB")
    memory.shrink("2MiB")
    before = len(broker.await_count(Return, 1))  # of what is more than an account keeps
    unused = broker.charged[number] - account.held
    assert unused > 0
    account.reserve("2MiB", group=tem.Group("tp", 2))
    assert [message.bytes for message in broker.got(Return)[before:]] == [unused]
    assert broker.charged[number] == account.held == 8 * MiB


def test_the_other_members_hear_of_one_that_may_not_have_so_much(opened: Opened, broker: Scripted) -> None:
    def deny(demand: Demand) -> Message:
        return Denied(OUT_OF_MEMORY, "its max is 8 MiB")

    broker.policy = deny
    account, _ = opened(max="8MiB")
    for wanted in ("10MiB", "1GiB"):
        with pytest.raises(tem.OutOfMemory, match="its max is 8 MiB"):
            account.reserve(wanted, group=tem.Group("tp", 2))
    assert len(broker.got(Demand)) == 2, "the broker is asked, and tells them"


def test_a_reservation_that_is_not_used_goes_back(arena: tem.Arena, opened: Opened, broker: Scripted) -> None:
    account, number = opened()
    account.reserve("16MiB").close()
    broker.await_count(Return, 1)
    assert account.held == 0
    assert broker.charged[number] <= KEPT


def test_closing_an_account_returns_its_lease_first(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    memory = account.range("8MiB")
    memory.grow("8MiB")
    memory.close()
    account.close()
    broker.await_count(Close, 1)
    assert number not in broker.charged


def test_a_grant_that_crosses_the_closing_of_its_account_goes_back_first(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    broker.policy = lambda demand: None
    with pytest.raises(tem.OutOfMemory, match="does not answer"):
        account.range("16MiB").grow("16MiB", timeout=0.01)
    broker.late = Grant(number, 16 * MiB)
    account.close()
    assert len(broker.got(Close)) == 2
    assert not arena.snapshot().accounts
    assert sum(broker.charged.values()) == 0


def test_an_account_that_a_broker_never_closes_is_an_error_and_stays(
    arena: tem.Arena, opened: Opened, broker: Scripted
) -> None:
    account, number = opened()
    broker.charged[number] = 2 * MiB  # of which this process knows nothing
    with pytest.raises(tem.InUseError, match="are leased to it"):
        account.close()
    assert len(broker.got(Close)) == 2
    assert len(arena.snapshot().accounts) == 1
    broker.charged[number] = 0
    account.close()
    assert not arena.snapshot().accounts


def test_a_demand_is_taken_back_when_its_own_account_has_to_give(opened: Opened, broker: Scripted) -> None:
    # As malloc's, which may wait with the GIL: its account's reclaimers could not run until it is denied.
    broker.policy = lambda demand: None
    account, number = opened()
    failed: list[BaseException] = []

    def allocate() -> None:
        try:
            account.allocator().allocate(4 * MiB, 0)
        except tem.OutOfMemory as error:
            failed.append(error)

    thread = threading.Thread(target=allocate)
    thread.start()
    broker.await_count(Demand, 1)
    assert broker.ask(number, 2 * MiB, TRIM)[-1].bytes == 0
    assert not broker.got(Withdraw)
    assert broker.ask(number, 2 * MiB, PAUSE)[-1].bytes == 0
    broker.await_count(Withdraw, 1)
    broker.answer(Denied(OUT_OF_MEMORY, "it was withdrawn"))
    thread.join(10)
    assert "withdrawn" in str(failed[0])
    account.close()


def test_closing_the_arena_says_goodbye(arena: tem.Arena, opened: Opened, broker: Scripted) -> None:
    account, _ = opened()
    account.close()
    arena.close()
    broker.await_count(Bye, 1)


def test_a_denied_group_leaves_nothing_behind(arena: tem.Arena, opened: Opened, broker: Scripted) -> None:
    def deny(demand: Demand) -> Message:
        return Denied(OUT_OF_MEMORY, "rank 1 cannot have its part")

    broker.policy = deny
    account, _ = opened()
    with pytest.raises(tem.OutOfMemory, match="rank 1"):
        account.reserve("8MiB", group=tem.Group("tp", 2))
    assert account.held == 0
    assert arena.snapshot().leased == 0


def test_the_brokers_share_is_not_the_arenas_to_change(arena: tem.Arena) -> None:
    with pytest.raises(tem.InvalidArgument, match="the broker shares out this device"):
        arena.set_capacity("32MiB")


def test_a_reserve_of_its_own_is_refused(rung: Rung, broker: Scripted) -> None:
    with pytest.raises(tem.InvalidArgument, match="the reserve is the broker's"):
        tem.Arena(rung.device, capacity="64MiB", reserve=(0, 0), broker=broker.path)


@pytest.mark.parametrize(("dearest", "number"), [("trim", TRIM), ("evict", 1), ("pause", PAUSE)])
def test_a_cache_says_how_dearly_others_may_be_asked(
    opened: Opened, broker: Scripted, dearest: str, number: int
) -> None:
    account, _ = opened()
    cache = tem.ElasticKVTensor(account, 8, (MiB,), torch.uint8)
    cache.ensure([0, 1], rung=dearest)
    assert broker.got(Demand)[-1].rung == number
    with pytest.raises(tem.InvalidArgument, match="the rungs are trim, evict"):
        cache.ensure([2], rung="bribe")
    cache.close()
