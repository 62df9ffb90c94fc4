"""A broker whose till answers what needs no decision, beside one without: nobody can tell them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.broker.world import Player, World
from torch_elastic_mem.broker.protocol import (
    FREE_ONLY,
    LAST,
    Ask,
    Demand,
    Gave,
    Grant,
    Limits,
    Message,
    Open,
    Opened,
    ProtocolError,
    Report,
    Return,
    Withdraw,
)
from torch_elastic_mem.broker.shares import Member, Share

DEVICES = ("HOST", "GPU-1")


class Client:
    """An account of a process in both worlds, and what the process knows."""

    def __init__(self, name: str, players: tuple[Player, Player], number: int) -> None:
        self.name = name
        self.players = players
        self.number = number
        self.lease = 0
        self.numbers = 0
        self.demands: set[int] = set()
        self.asks: dict[int, Ask] = {}
        self.shared: list[tuple[Share, Member]] = []


class TillMachine(RuleBasedStateMachine):
    @initialize(reserve=st.sampled_from([(0, 0), (5, 20)]), grace=st.sampled_from([0.0, 0.5]))
    def begin(self, reserve: tuple[int, int], grace: float) -> None:
        self.worlds = (
            World(reserve=reserve, till=True, grace=grace),
            World(reserve=reserve, till=False, grace=grace),
        )
        self.clients: list[Client] = []
        self.names = 0
        for device, value in (("HOST", 0), ("HOST", 100), ("GPU-1", 0)):
            self.open(device, value, 0, None, 1, None)

    def pick(self, index: int) -> Client | None:
        return self.clients[index % len(self.clients)] if self.clients else None

    def both(self, act: Callable[[World], object]) -> None:
        """Does the same in both worlds, and has the processes read what they are told."""
        for world in self.worlds:
            act(world)
            world.deliver()
        self.read()

    def say(self, client: Client, message: Message, number: int | None = None) -> int:
        if number is None:
            client.numbers += 1
            number = client.numbers
        refused = []
        for player in client.players:
            try:
                player.say(message, number)
            except ProtocolError as error:
                refused.append(str(error))
        assert len(refused) in (0, 2) and len(set(refused)) < 2
        self.read()
        return number

    def read(self) -> None:
        for client in self.clients:
            told, same = (player.inbox for player in client.players)
            assert told == same
            for number, message in told:
                if isinstance(message, Ask):
                    client.asks[number] = message
                elif number in client.demands:
                    client.demands.remove(number)
                    client.lease += message.bytes if isinstance(message, Grant) else 0
            for player in client.players:
                player.inbox.clear()

    @rule(
        device=st.sampled_from(DEVICES),
        value=st.sampled_from([0, 100, 1000]),
        min=st.sampled_from([0, 0, 10]),
        max=st.none() | st.integers(10, 80),
        step=st.sampled_from([1, 4]),
        beside=st.none() | st.integers(0, 9),
    )
    def open(self, device: str, value: int, min: int, max: int | None, step: int, beside: int | None) -> None:
        """`beside` an account of the same process, on another connection."""
        if len(self.clients) > 4:
            return
        other = self.pick(beside) if beside is not None else None
        self.names += 1
        name = f"a{self.names}"
        players = []
        answers: list[Any] = []
        for at, world in enumerate(self.worlds):
            player = world.player(other.players[at].process if other else None, device)
            player.session.granularity = step
            limits = Limits(value, min) if max is None else Limits(value, min, max=max)
            answers.append(player.answer(player.say(Open(name, f"c{value}", limits, 0))))
            player.inbox.clear()
            players.append(player)
        assert answers[0] == answers[1]
        if isinstance(answers[0], Opened):
            client = Client(name, (players[0], players[1]), answers[0].account)
            client.numbers = players[0].numbers
            self.clients.append(client)
            self.report(len(self.clients) - 1, 31, 0)
        self.read()

    @rule(
        index=st.integers(0, 9),
        bytes=st.integers(0, 60),
        extra=st.integers(0, 30),
        rung=st.sampled_from([FREE_ONLY, 0, 1, 4]),
        timeout=st.sampled_from([0.0, 0.3, 2.0]),
        group=st.sampled_from(["", "", "", "g"]),
    )
    def demand(self, index: int, bytes: int, extra: int, rung: int, timeout: float, group: str) -> None:
        if client := self.pick(index):
            client.demands.add(client.numbers + 1)
            limit = int(timeout * 1e6)
            members = 1 if group else 0
            self.say(client, Demand(client.number, rung, bytes, bytes + extra, limit, group, members))

    @rule(index=st.integers(0, 9), rung=st.sampled_from([0, 1, 4]), timeout=st.sampled_from([0.3, 2.0]))
    def demand_much(self, index: int, rung: int, timeout: float) -> None:
        """What is free and half of what others hold, so that somebody has to yield."""
        if client := self.pick(index):
            device = self.worlds[0].device(client.players[0].device)
            bytes = device.free + max(0, device.leased - client.lease + 1) // 2
            client.demands.add(client.numbers + 1)
            self.say(client, Demand(client.number, rung, bytes, bytes, int(timeout * 1e6)))

    @rule(index=st.integers(0, 9), part=st.integers(1, 4))
    def give_back(self, index: int, part: int) -> None:
        if client := self.pick(index):
            bytes = client.lease // part
            client.lease -= bytes
            self.say(client, Return(client.number, bytes))

    @rule(index=st.integers(0, 9), other=st.integers(0, 9))
    def lie(self, index: int, other: int) -> None:
        """More than it holds, or somebody else's."""
        client, robbed = self.pick(index), self.pick(other)
        if client and robbed:
            numbers = {client.number, robbed.number}
            for number in numbers - ({client.number} if client.lease < robbed.lease else set()):
                self.say(client, Return(number, 1000))

    @rule(index=st.integers(0, 9), rungs=st.integers(0, 31), idle=st.integers(0, 10))
    def report(self, index: int, rungs: int, idle: int) -> None:
        if client := self.pick(index):
            self.say(client, Report(client.number, rungs, client.lease, idle))

    @rule(index=st.integers(0, 9))
    def withdraw(self, index: int) -> None:
        client = self.pick(index)
        if client and client.demands:
            self.say(client, Withdraw(), min(client.demands))

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
        self.say(client, Gave(client.number, LAST if last else 0, bytes, coming), number)

    @rule(index=st.integers(0, 9), bytes=st.integers(1, 40))
    def share(self, index: int, bytes: int) -> None:
        client = self.pick(index)
        if client is None or client.shared or not bytes <= client.lease:
            return

        def publish(world: World) -> None:
            player = client.players[self.worlds.index(world)]
            books = world.broker.books[player.device]
            member = Member(player.process, "python")
            holder = books.accounts.holders[client.number]
            client.shared.append((books.shares.publish(client.name, bytes, holder, member), member))

        self.both(publish)

    @rule(index=st.integers(0, 9))
    def leave_share(self, index: int) -> None:
        client = self.pick(index)
        if client is None or not client.shared:
            return

        def leave(world: World) -> None:
            at = self.worlds.index(world)
            world.broker.books[client.players[at].device].shares.leave(*client.shared[at])
            world.broker.tick()

        self.both(leave)
        client.shared.clear()

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.5]))
    def wait(self, seconds: float) -> None:
        for world in self.worlds:
            world.wait(seconds)
        self.read()

    @rule(index=st.integers(0, 9), how=st.sampled_from(["die", "leave", "lose"]))
    def end(self, index: int, how: str) -> None:
        client = self.pick(index)
        if client is None or len(self.clients) < 3:
            return
        process = client.players[0].process
        # The others of the process would have to end with it.
        if how == "die" and sum(each.players[0].process is process for each in self.clients) > 1:
            return
        self.clients.remove(client)
        for player in client.players:
            getattr(player, how)()
        self.read()

    @rule(used=st.integers(0, 120))
    def look(self, used: int) -> None:
        for world in self.worlds:
            if "GPU-1" in world.broker.books:
                world.look("GPU-1", 100, used)
        self.read()

    @rule(index=st.integers(0, 9), value=st.sampled_from([0, 100, 1000]))
    def move(self, index: int, value: int) -> None:
        if client := self.pick(index):
            self.both(lambda world: world.broker.set_priority(client.name, value))

    @rule(index=st.integers(0, 9), most=st.integers(50, 100))
    def limit(self, index: int, most: int) -> None:
        if client := self.pick(index):
            self.both(lambda world: world.broker.set_limits(None, client.name, max=most))

    @precondition(lambda self: hasattr(self, "worlds"))
    @rule()
    def compare(self) -> None:
        told, same = (self.seen(world) for world in self.worlds)
        assert told == same

    def teardown(self) -> None:
        if hasattr(self, "worlds"):
            self.compare()

    @staticmethod
    def seen(world: World) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        state = msgspec.to_builtins(world.broker.state())
        events = [msgspec.to_builtins(event) for event in world.broker.events(0)]
        del state["epoch"]
        for event in events:
            # Seconds as nanoseconds and back, in floating point.
            event["start_ns"] = round(event["start_ns"], -3)
        return state, events


TestTillMachine = TillMachine.TestCase
TestTillMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
