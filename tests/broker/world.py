"""A broker without sockets, in a time that passes when a test says so. Sizes are small numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_elastic_mem.broker.broker import Broker
from torch_elastic_mem.broker.config import parse
from torch_elastic_mem.broker.device_view import Reading
from torch_elastic_mem.broker.protocol import (
    HOST,
    LAST,
    Ask,
    Close,
    Demand,
    Denied,
    Gave,
    Grant,
    Hello,
    Limits,
    Message,
    Open,
    Opened,
    Passed,
    Refused,
    Report,
    Return,
    Welcome,
    Withdraw,
)
from torch_elastic_mem.broker.session import Process, Session
from torch_elastic_mem.broker.state import AccountState, DeviceState


class View:
    """Devices as a test wants them seen."""

    def __init__(self) -> None:
        self.readings: dict[str, Reading] = {}

    def read(self, uuid: str) -> Reading | None:
        return self.readings.get(uuid)


class World:
    """With `till`, what needs no decision is answered at the till, as the server's teller does."""

    def __init__(
        self, capacity: int = 100, reserve: tuple[int, int] = (0, 0), till: bool = False, **more: Any
    ) -> None:
        self.now = 1000.0
        self.view = View()
        grace = more.pop("grace", 0.0)
        devices = {
            name: {"capacity": capacity, "reserve": list(reserve)} for name in (HOST, "GPU-1", "GPU-2")
        }
        self.config = {"device": devices, **more}
        self._broker = Broker(parse(self.config), self.view, grace, 500, lambda: self.now)
        self.till = till
        self.at_the_till = 0
        self.players: dict[Session, Player] = {}
        self.pids = 0
        self.heard: Callable[[], None] = lambda: None

    @property
    def broker(self) -> Broker:
        """Whoever touches it begins a turn."""
        self._broker.tills.write(self._broker.tills.notes())
        return self._broker

    def player(self, process: Process | None = None, device: str = HOST, uid: int = 0) -> Player:
        if process is None:
            self.pids += 1
            process = Process(self.pids, uid, 1000)
        return Player(self, process, device)

    def deliver(self) -> None:
        """Ends a turn."""
        for session, number, message in self._broker.post:
            if session in self.players:
                self.players[session].inbox.append((number, message))
        self._broker.post.clear()
        if self.till:
            self._broker.tills.open()
        self.heard()

    def receive(self, player: Player, number: int, message: Message) -> None:
        if self.till and self.ask_the_till(player, number, message):
            self.at_the_till += 1
            self.heard()
        else:
            self.broker.receive(player.session, number, message)
            self.deliver()

    def ask_the_till(self, player: Player, number: int, message: Message) -> bool:
        till = self._broker.books[player.device].accounts.till
        session = player.session.number
        match message:
            case Demand(account=account, group=""):
                now = int(self.now * 1e9) + self.at_the_till
                bytes = till.grant(session, account, message.bytes, message.want, now)
                if bytes is not None:
                    player.inbox.append((number, Grant(account, bytes)))
                return bytes is not None
            case Return(account=account):
                return till.take_back(session, account, message.bytes)
            case Report(account=account):
                blocks = message.in_use, message.cached, message.free, message.parked
                return till.report(session, account, message.rungs, message.held, message.idle, blocks)
        return False

    def wait(self, seconds: float) -> None:
        """Lets time pass, and the broker do what is due on the way."""
        end = self.now + seconds
        ticks = 0
        while (wake := self.broker.wake()) <= end:
            self.now = max(self.now, wake)
            self.broker.tick()
            self.deliver()
            assert self.broker.wake() > self.now, "the broker would come back at once, for ever"
            ticks += 1
            assert ticks < 100 + 100 * seconds, "the broker comes back too often"
        self.now = end
        self.broker.tick()
        self.deliver()

    def look(self, uuid: str, total: int, used: int, processes: dict[int, int] | None = None) -> None:
        self.view.readings[uuid] = Reading(total, used, processes)
        self.broker.look({uuid: self.view.readings[uuid]})
        self.deliver()

    def device(self, uuid: str = HOST) -> DeviceState:
        return next(each for each in self.broker.state().devices if each.uuid == uuid)

    def account(self, name: str, uuid: str = HOST) -> AccountState:
        return next(each for each in self.device(uuid).accounts if each.name == name)

    def lease(self, name: str, uuid: str = HOST) -> int:
        return self.account(name, uuid).lease


class Player:
    """A process that does only what the test says."""

    def __init__(self, world: World, process: Process, device: str) -> None:
        self.world = world
        self.process = process
        self.device = device
        self.inbox: list[tuple[int, Message]] = []
        self.numbers = 0
        self.connect()

    def connect(self) -> None:
        backend = "host" if self.device == HOST else "cuda"
        hello = Hello(self.device, backend, self.device, "python", 100, 1)
        self.session = self.world.broker.hello(self.process, 0, hello)
        self.world.players[self.session] = self
        self.world.deliver()
        (self.welcome,) = self.take(Welcome)
        self.inbox.clear()

    def say(self, message: Message, number: int | None = None) -> int:
        if number is None:
            self.numbers += 1
            number = self.numbers
        self.world.receive(self, number, message)
        return number

    def take(self, kind: type[Message]) -> list[Any]:
        """The messages of a kind that have come, which are forgotten then."""
        found = [message for _, message in self.inbox if isinstance(message, kind)]
        self.inbox = [each for each in self.inbox if not isinstance(each[1], kind)]
        return found

    def answer(self, number: int) -> Message | None:
        found = [
            message for at, message in self.inbox if at == number and not isinstance(message, Ask | Passed)
        ]
        assert len(found) <= 1, "answered twice"
        return found[0] if found else None

    def open(self, name: str, value: int = 0, lease: int = 0, rungs: int = 0b11111, **limits: int) -> Account:
        answer = self.answer(self.say(Open(name, f"class {value}", Limits(value, **limits), lease)))
        assert isinstance(answer, Opened), answer
        account = Account(self, answer.account, answer.limits)
        account.report(rungs)
        return account

    def refusal(self, message: Message) -> Refused:
        answer = self.answer(self.say(message))
        assert isinstance(answer, Refused), answer
        return answer

    def asks(self) -> list[tuple[int, Ask]]:
        """What it was asked for, once."""
        found = [(number, message) for number, message in self.inbox if isinstance(message, Ask)]
        self.inbox = [each for each in self.inbox if not isinstance(each[1], Ask)]
        return found

    def lose(self) -> None:
        self.world.broker.lose(self.session)
        self.world.deliver()

    def leave(self) -> None:
        self.world.broker.leave(self.session)
        self.world.deliver()

    def die(self) -> None:
        self.lose()
        self.world.broker.bury(self.process)
        self.world.deliver()


class Account:
    def __init__(self, player: Player, number: int, limits: Limits) -> None:
        self.player = player
        self.number = number
        self.limits = limits

    def report(self, rungs: int, held: int = 0, idle: int = 0) -> None:
        self.player.say(Report(self.number, rungs, held, idle))

    def demand(self, bytes: int, want: int = 0, *, rung: int = 4, timeout: float = 10.0, **group: Any) -> int:
        limit = int(timeout * 1e6)
        return self.player.say(Demand(self.number, rung, bytes, max(bytes, want), limit, **group))

    def granted(self, number: int) -> int:
        answer = self.player.answer(number)
        assert isinstance(answer, Grant), answer
        assert answer.account == self.number
        return answer.bytes

    def denied(self, number: int) -> Denied:
        answer = self.player.answer(number)
        assert isinstance(answer, Denied), answer
        return answer

    def waits(self, number: int) -> bool:
        return self.player.answer(number) is None

    def get(self, bytes: int, want: int = 0, **how: Any) -> int:
        return self.granted(self.demand(bytes, want, **how))

    def put(self, bytes: int) -> None:
        self.player.say(Return(self.number, bytes))

    def asks(self) -> list[tuple[int, int, int]]:
        """Number, bytes and rung of each ask of this account since the last look."""
        found = [(number, ask) for number, ask in self.player.inbox if isinstance(ask, Ask)]
        mine = [each for each in found if each[1].account == self.number]
        self.player.inbox = [each for each in self.player.inbox if each not in mine]
        return [(number, ask.bytes, ask.rung) for number, ask in mine]

    def asked(self) -> list[tuple[int, int]]:
        """The same without the numbers."""
        return [(bytes, rung) for _, bytes, rung in self.asks()]

    def give(self, number: int, bytes: int, *, coming: int = 0, last: bool = True) -> None:
        self.player.say(Gave(self.number, LAST if last else 0, bytes, coming), number)

    def give_what_is_asked(self) -> int:
        sum = 0
        for number, bytes, _ in self.asks():
            self.give(number, bytes)
            sum += bytes
        return sum

    def withdraw(self, number: int) -> None:
        self.player.say(Withdraw(), number)

    def close(self) -> int:
        return self.player.say(Close(self.number))
