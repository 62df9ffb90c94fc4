"""In whatever order processes publish, return, leave and die: charged once, until the last member leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torch_elastic_mem.broker.broker import Broker
from torch_elastic_mem.broker.config import merge
from torch_elastic_mem.broker.protocol import HOST, Close, Demand, Hello, Limits, Open, Opened, Return
from torch_elastic_mem.broker.rules import NotPermitted
from torch_elastic_mem.broker.session import Process, Session
from torch_elastic_mem.broker.shares import LONGEST_NAME, Member, Share
from torch_elastic_mem.errors import InUseError, InvalidArgument

ALL = 1 << 30
SIZES = st.integers(1, 100 << 20)


class Tenant:
    """A process with one account, as its own arena knows it."""

    def __init__(self, world: World, uid: int = 0) -> None:
        world.pids += 1
        self.world = world
        self.process = Process(world.pids, uid, 1000)
        self.session: Session = world.broker.hello(self.process, 0, Hello(HOST, "host", HOST, "t", ALL, 1))
        self.lease = 0
        # The message that opens it is the last in the post.
        self.say(Open("share it", "serving", Limits(1000), 0))
        opened = world.broker.post[-1][2]
        assert isinstance(opened, Opened), opened
        self.account = opened.account

    @property
    def holder(self) -> Any:
        return self.world.books.accounts.holders[self.account]

    def say(self, message: Any) -> None:
        self.world.broker.receive(self.session, 1, message)

    def grow(self, bytes: int) -> None:
        before = self.holder.lease
        self.say(Demand(self.account, 0, bytes, bytes, 0))
        self.lease += self.holder.lease - before

    def give(self, bytes: int) -> None:
        self.lease -= bytes
        self.say(Return(self.account, bytes))


@dataclass(eq=False)
class Known:
    """A share, as the model has it: what its publisher gave back of it is the share's own."""

    share: Share
    publisher: Tenant
    least: int
    members: list[Member] = field(default_factory=list)


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.pids = 0
        config = merge({}, capacities=(f"HOST={ALL}",), reserves=(), metrics=None, log=None)
        self.broker = Broker(config, clock=lambda: self.now)
        self.books = self.broker.books[HOST]

    def shares(self) -> Any:
        return self.books.shares

    def leased(self) -> int:
        return self.books.accounts.ledger.leased


class Charge(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.tenants: list[Tenant] = []
        self.known: list[Known] = []

    def a_tenant(self, data: st.DataObject) -> Tenant:
        return data.draw(st.sampled_from(self.tenants))

    @rule()
    def start(self) -> None:
        self.tenants.append(Tenant(self.world))

    @precondition(lambda self: self.tenants)
    @rule(data=st.data(), bytes=SIZES)
    def grow(self, data: st.DataObject, bytes: int) -> None:
        self.a_tenant(data).grow(bytes)

    @precondition(lambda self: self.tenants)
    @rule(data=st.data(), name=st.sampled_from("abc"), part=st.floats(0.01, 1.0))
    def publish(self, data: st.DataObject, name: str, part: float) -> None:
        tenant = self.a_tenant(data)
        bytes = int(tenant.lease * part)
        member = Member(tenant.process, "t")
        taken = any(each.share.name == name or each.publisher is tenant for each in self.known)
        if not bytes or taken:
            with pytest.raises((InUseError, InvalidArgument)):
                self.world.shares().publish(name, bytes, tenant.holder, member)
            return
        share = self.world.shares().publish(name, bytes, tenant.holder, member)
        self.known.append(Known(share, tenant, tenant.lease, [member]))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        found = data.draw(st.sampled_from(self.known))
        member = Member(Process(9999, 0, 1), "u")
        assert self.world.shares().join(found.share.name, member) is found.share
        found.members.append(member)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        found = data.draw(st.sampled_from(self.known))
        member = data.draw(st.sampled_from(found.members))
        found.members.remove(member)
        assert self.world.shares().leave(found.share, member) is not bool(found.members)
        self.world.broker.tick()
        if not found.members:
            self.known.remove(found)

    @precondition(lambda self: self.tenants)
    @rule(data=st.data(), part=st.floats(0, 1))
    def give(self, data: st.DataObject, part: float) -> None:
        tenant = self.a_tenant(data)
        tenant.give(int(tenant.lease * part))

    @precondition(lambda self: self.tenants)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        tenant = self.a_tenant(data)
        tenant.give(tenant.lease)
        tenant.say(Close(tenant.account))
        self.world.broker.leave(tenant.session)
        self.gone(tenant)

    @precondition(lambda self: self.tenants)
    @rule(data=st.data())
    def bye(self, data: st.DataObject) -> None:
        tenant = self.a_tenant(data)
        self.world.broker.leave(tenant.session)
        tenant.lease = 0
        self.gone(tenant)

    @precondition(lambda self: self.tenants)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        tenant = self.a_tenant(data)
        self.world.broker.lose(tenant.session)
        self.world.broker.bury(tenant.process)
        tenant.lease = 0
        self.gone(tenant)

    def gone(self, tenant: Tenant) -> None:
        for each in self.known:
            if each.publisher is tenant:
                each.least = 0
        if tenant in self.tenants:
            self.tenants.remove(tenant)

    @invariant()
    def each_byte_is_charged_once(self) -> None:
        accounts = self.world.books.accounts
        for each in self.known:
            each.least = min(each.least, each.publisher.lease)
            assert each.share.heir.lease == max(0, each.share.bytes - each.least)
        own = sum(tenant.lease for tenant in self.tenants)
        inherited = sum(each.share.heir.lease for each in self.known)
        assert self.world.leased() == own + inherited
        assert self.world.leased() == sum(holder.lease for holder in accounts.holders.values())

    @invariant()
    def parts_add_up(self) -> None:
        shown = {each.name: each for each in self.world.broker.state().devices[0].shared}
        assert shown.keys() == {each.share.name for each in self.known}
        for each in self.known:
            state = shown[each.share.name]
            assert sum(member.share for member in state.members) == state.bytes == each.share.bytes
            assert len(state.members) == len(each.members)

    def teardown(self) -> None:
        for each in self.known:
            for member in each.members:
                self.world.shares().leave(each.share, member)
        for tenant in list(self.tenants):
            self.world.broker.leave(tenant.session)
        self.world.now += 2.0
        self.world.broker.tick()
        assert self.world.leased() == 0
        assert not self.world.books.accounts.holders and not self.world.books.accounts.heirs


TestCharge = Charge.TestCase
TestCharge.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def published(world: World) -> tuple[Tenant, Share]:
    tenant = Tenant(world)
    tenant.grow(1000)
    return tenant, world.shares().publish("base", 1000, tenant.holder, Member(tenant.process, "t"))


def test_nobody_is_asked_for_what_is_shared() -> None:
    world = World()
    tenant, share = published(world)
    tenant.give(1000)
    rich = Tenant(world)
    world.broker.post.clear()
    rich.say(Demand(rich.account, 4, ALL - 500, ALL - 500, 1_000_000))
    assert not [message for _, _, message in world.broker.post if type(message).__name__ == "Ask"]
    world.now += 2
    world.broker.tick()
    assert share.heir.lease == 1000 and world.leased() == 1000


def test_a_share_has_a_name_and_is_no_larger_than_its_account() -> None:
    world = World()
    tenant = Tenant(world)
    tenant.grow(1000)
    check = world.shares().check
    for name in ("", "x" * (LONGEST_NAME + 1)):
        with pytest.raises(InvalidArgument, match="has a name of 1 to"):
            check(name, 0, 10, tenant.holder)
    for bytes in (0, 1001):
        with pytest.raises(InvalidArgument, match="has 1000 B, and cannot share"):
            check("base", 0, bytes, tenant.holder)
    world.shares().publish("base", 10, tenant.holder, Member(tenant.process, "t"))
    with pytest.raises(InUseError, match="has a share already"):
        check("other", 0, 10, tenant.holder)


def test_another_user_is_not_served() -> None:
    world = World()
    published(world)
    with pytest.raises(NotPermitted, match="'base' belongs to user 0, and user 7 asks for it"):
        world.shares().join("base", Member(Process(1, 7, 1), "t"))
    with pytest.raises(InvalidArgument, match="user 7 has none"):
        world.shares().join("bass", Member(Process(1, 7, 1), "t"))


def test_who_comes_back_with_less_has_given_it_to_the_share() -> None:
    world = World()
    tenant, share = published(world)
    world.broker.lose(tenant.session)
    session = world.broker.hello(tenant.process, 0, Hello(HOST, "host", HOST, "t", ALL, 1))
    world.broker.receive(session, 1, Open("share it", "serving", Limits(1000), 400))
    assert share.heir.lease == 600 and world.leased() == 1000
