"""The books against everything that tenants can do, in any order: what must hold holds after every step."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.broker.world import Account, World
from torch_elastic_mem.broker.protocol import (
    FREE_ONLY,
    LAST,
    Ask,
    Close,
    Demand,
    Denied,
    Gave,
    Grant,
    Limits,
    Open,
    Opened,
    Refused,
    Return,
    Withdraw,
)

DEVICES = ("HOST", "GPU-1")


class Client:
    """What an account's process knows: it charges itself when it receives, and discharges before it sends."""

    def __init__(self, account: Account, name: str, value: int, min: int, max: int | None) -> None:
        self.account = account
        self.name = name
        self.value, self.min, self.max = value, min, max
        self.lease = 0
        self.debts = 0
        self.demands: dict[int, int] = {}
        self.asks: dict[int, Ask] = {}


class BooksMachine(RuleBasedStateMachine):
    @initialize(reserve=st.sampled_from([(0, 0), (5, 20)]), till=st.booleans())
    def begin(self, reserve: tuple[int, int], till: bool) -> None:
        self.world = World(reserve=reserve, till=till)
        self.world.heard = self.read
        self.clients: list[Client] = []
        self.names = 0
        self.rounds = 0
        for device, value in (("HOST", 0), ("HOST", 100), ("HOST", 1000), ("GPU-1", 0), ("GPU-1", 100)):
            self.open(device, value, 0, None, 0b11111)

    def pick(self, index: int) -> Client | None:
        return self.clients[index % len(self.clients)] if self.clients else None

    def read(self) -> None:
        """Tenants take their messages in."""
        for client in self.clients:
            player = client.account.player
            for number, message in player.inbox:
                if isinstance(message, Ask):
                    assert message.account == client.account.number
                    assert 0 < message.bytes <= max(0, client.lease - client.min)
                    assert not (client.debts and player.process.debts), "debtors are not asked"
                    client.asks[number] = message
                elif isinstance(message, Grant | Denied):
                    least = client.demands.pop(number)
                    if isinstance(message, Grant):
                        assert not (client.debts and player.process.debts), "debtors get nothing"
                        assert message.bytes >= least
                        client.lease += message.bytes
                        assert client.max is None or not message.bytes or client.lease <= client.max
            player.inbox = [each for each in player.inbox if not isinstance(each[1], Ask | Grant | Denied)]
            client.debts = player.process.debts

    @rule(
        device=st.sampled_from(DEVICES),
        value=st.sampled_from([0, 100, 1000]),
        min=st.sampled_from([0, 0, 10]),
        max=st.none() | st.integers(10, 80),
        rungs=st.integers(0, 31),
    )
    def open(self, device: str, value: int, min: int, max: int | None, rungs: int) -> None:
        if len(self.clients) > 6:
            return
        player = self.world.player(device=device)
        self.names += 1
        name = f"a{self.names}"
        limits = Limits(value, min) if max is None else Limits(value, min, max=max)
        answer = player.answer(player.say(Open(name, f"c{value}", limits, 0)))
        if isinstance(answer, Opened):
            player.inbox.clear()
            account = Account(player, answer.account, limits)
            account.report(rungs)
            self.clients.append(Client(account, name, value, min, max))

    @rule(
        index=st.integers(0, 9),
        bytes=st.integers(0, 110),
        extra=st.integers(0, 30),
        rung=st.sampled_from([FREE_ONLY, 0, 1, 4]),
        timeout=st.sampled_from([0.0, 0.3, 2.0]),
    )
    def demand(self, index: int, bytes: int, extra: int, rung: int, timeout: float) -> None:
        if client := self.pick(index):
            self.send_demand(client, bytes, extra, rung, timeout, "", 0)

    @rule(index=st.integers(0, 9), rung=st.sampled_from([0, 1, 4]))
    def demand_much(self, index: int, rung: int) -> None:
        """What is free and half of what others hold, so that somebody has to yield."""
        if client := self.pick(index):
            device = self.world.device(client.account.player.device)
            lease = self.world.lease(client.name, device.uuid)
            self.send_demand(client, device.free + (device.leased - lease + 1) // 2, 0, rung, 2.0, "", 0)

    def send_demand(
        self, client: Client, bytes: int, extra: int, rung: int, timeout: float, group: str, members: int
    ) -> None:
        player = client.account.player
        player.numbers += 1
        client.demands[player.numbers] = bytes
        message = Demand(
            client.account.number, rung, bytes, bytes + extra, int(timeout * 1e6), group, members, self.rounds
        )
        player.say(message, player.numbers)

    @rule(
        first=st.integers(0, 9), second=st.integers(0, 9), bytes=st.integers(0, 60), members=st.integers(1, 3)
    )
    def group(self, first: int, second: int, bytes: int, members: int) -> None:
        one, two = self.pick(first), self.pick(second)
        if one is None or two is None or one is two:
            return
        self.rounds += 1
        self.send_demand(one, bytes, 0, 4, 1.0, "g", members)
        if members > 1:
            self.send_demand(two, bytes, 0, 4, 1.0, "g", members)

    @rule(index=st.integers(0, 9))
    def withdraw(self, index: int) -> None:
        client = self.pick(index)
        if client is not None and client.demands:
            client.account.player.say(Withdraw(), next(iter(client.demands)))

    @rule(index=st.integers(0, 9), part=st.integers(1, 4))
    def give_back(self, index: int, part: int) -> None:
        if client := self.pick(index):
            bytes = client.lease // part
            client.lease -= bytes
            client.account.player.say(Return(client.account.number, bytes))

    @rule(index=st.integers(0, 9), part=st.integers(0, 2), coming=st.integers(0, 20), last=st.booleans())
    def answer(self, index: int, part: int, coming: int, last: bool) -> None:
        asked = [client for client in self.clients if client.asks]
        if not asked:
            return
        client = asked[index % len(asked)]
        number, ask = next(iter(client.asks.items()))
        bytes = 0 if part == 0 else min(client.lease, ask.bytes // part)
        client.lease -= bytes
        if last:
            del client.asks[number]
        client.account.player.say(Gave(client.account.number, LAST if last else 0, bytes, coming), number)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.5]))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @rule(index=st.integers(0, 9))
    def close(self, index: int) -> None:
        client = self.pick(index)
        if client is None or len(self.clients) < 4:
            return
        charged = self.world.lease(client.name, client.account.player.device)
        number = client.account.player.say(Close(client.account.number))
        refused = isinstance(client.account.player.answer(number), Refused)
        assert refused == (charged > 0)
        if not refused:
            assert not client.demands
            self.clients.remove(client)

    @rule(index=st.integers(0, 9), how=st.sampled_from(["die", "leave"]))
    def end(self, index: int, how: str) -> None:
        client = self.pick(index)
        if client is not None and len(self.clients) > 3:
            self.clients.remove(client)
            getattr(client.account.player, how)()

    @rule(index=st.integers(0, 9))
    def come_back(self, index: int) -> None:
        client = self.pick(index)
        if client is None:
            return
        player = client.account.player
        player.lose()
        client.demands.clear()
        client.asks.clear()
        player.connect()
        own = {} if client.max is None else {"max": client.max}
        client.account = player.open(client.name, client.value, client.lease, min=client.min, **own)

    @rule(used=st.integers(0, 120))
    def look(self, used: int) -> None:
        if "GPU-1" in {device.uuid for device in self.world.broker.state().devices}:
            self.world.look("GPU-1", 100, used)

    @rule(index=st.integers(0, 9), value=st.sampled_from([0, 100, 1000]))
    def move(self, index: int, value: int) -> None:
        if client := self.pick(index):
            self.world.broker.set_priority(f"{client.name}", value)
            self.world.deliver()

    @rule(index=st.integers(0, 9), most=st.integers(50, 100))
    def limit(self, index: int, most: int) -> None:
        if client := self.pick(index):
            client.max = most
            self.world.broker.set_limits(None, client.name, max=most)
            self.world.deliver()

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def what_must_hold(self) -> None:
        for device in self.world.broker.state().devices:
            leased = sum(account.lease for account in device.accounts)
            assert leased == device.leased
            if device.uuid == "HOST":
                assert leased <= device.capacity - device.reserve_low
        for client in self.clients:
            charged = self.world.lease(client.name, client.account.player.device)
            assert charged >= client.lease, "the broker's figure is never below the client's"


TestBooksMachine = BooksMachine.TestCase
TestBooksMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
