"""The memory of all of an engine's ranks, as its scheduler orders it.

Each rank is a process with a cache of its own, and all have memory under the same chunks. Every step bears a
number, and an order to release says behind which step it is carried out: each rank does so when its own
stream has that step's work, however far ahead the scheduler is, in a pipeline too. So an order may be given
at any time, whether or not a step is on its way, and it reaches an idle engine.

Memory that grows is used by a step only after every rank has said that it has it; where one is refused, the
others give theirs back.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch_elastic_mem.errors import OutOfMemory
from torch_elastic_mem.integrations.vllm import line
from torch_elastic_mem.integrations.vllm.line import Door, Line
from torch_elastic_mem.integrations.vllm.memory import CalledOff, Resting

log = logging.getLogger("vllm.torch_elastic_mem")


class Ranks:
    """One engine's. Thread-safe.

    Demands are counted in chunks here: ranks of a pipeline differ in what a chunk's bytes are.

    Args:
        members: how many there are.

    Attributes:
        elastic: whether all are, once they have been met. All below is known then.
    """

    freed_bytes = 1
    chunk_bytes = 1

    def __init__(self, members: int) -> None:
        self.members = members
        self.elastic = False
        self.num_blocks = self.chunk_blocks = 0
        self.on_enqueued: Callable[[], None] = lambda: None
        self.resting: Resting | None = None
        self._lines: list[Line] = []
        self._lock = threading.Lock()  # guards the next three
        self._step = 0
        self._yielded = 0  # chunks, since the beginning
        self._desks: dict[str, Desk] = {}
        self._numbers = itertools.count(1)
        self._growing = threading.Lock()
        self._answered = threading.Condition()
        self._under_way = 0  # the growth that is, by its number; all below are guarded by the condition
        self._revocable = 0  # the same, where it is to bring memory
        self._answers: dict[int, str | None] = {}  # to it, by rank
        self._called_off = 0  # the last that was
        self._gone = False

    def meet(self, door: Door) -> None:
        """Waits until every rank has said what its cache is like, and says what they agree on.

        Raises:
            OSError, EOFError: the door was closed, or a rank has ended, before.
        """
        met: list[tuple[line.Hello, Line]] = []
        while len(met) < self.members:
            caller = door.accept()
            self._lines.append(caller)
            hello = caller.receive()
            assert isinstance(hello, line.Hello)
            met.append((hello, caller))
        hellos = [hello for hello, _ in met]
        self.num_blocks = min(hello.num_blocks for hello in hellos)
        self.elastic = 0 < self.num_blocks == max(hello.num_blocks for hello in hellos)
        self.chunk_blocks = agreed(hellos) if self.elastic else 0
        self._broadcast(line.Welcome(self.chunk_blocks, f"vllm-{uuid.uuid4().hex}", self.members))
        for hello, caller in met:
            threading.Thread(
                target=self._hear, args=(hello.rank, caller), name=f"tem-rank-{hello.rank}", daemon=True
            ).start()

    @property
    def account(self) -> Ranks:
        """What is said to it is said to every rank's."""
        return self

    def on_reclaim(self, fn: Callable[[int, float], object], rung: str) -> Desk:
        """Has demands on any rank answered, on a thread of their own."""
        desk = Desk(fn, rung, self)
        with self._lock:
            self._desks[rung] = desk
        self._broadcast(line.Listen(rung))
        return desk

    def note_blocks(self, in_use: int, cached: int, free: int, parked: int) -> None:
        """Says on every rank what is in the engine's blocks."""
        self._broadcast(line.Blocks(in_use, cached, free, parked))

    def freed(self, chunks: Iterable[int]) -> int:
        """Whole chunks; of a last one that is short, none is promised."""
        whole = self.num_blocks // self.chunk_blocks
        return sum(chunk < whole for chunk in chunks)

    def use_stream(self) -> None:
        """Each rank knows its own."""

    def number(self, step: Any) -> None:
        """Numbers a step. What is released from now on goes behind its work, wherever that is under way."""
        with self._lock:
            self._step += 1
            step.elastic_step = self._step
        self.on_enqueued()

    def room(self) -> int:
        """0: the ranks' processes know."""
        return 0

    def ensure(self, chunks: Iterable[int], rung: str = "pause", timeout: float | None = None) -> None:
        """Puts memory under all of the chunks on every rank, or nowhere.

        Raises:
            OutOfMemory: a rank was refused. CalledOff: somebody else was given it.
        """
        wanted = list(chunks)
        with self._growing:
            number = next(self._numbers)
            with self._answered:
                self._under_way, self._answers = number, {}
                self._revocable = number if wanted else 0
                self._broadcast(line.Grow(number, wanted, rung, timeout))
                self._answered.wait_for(lambda: len(self._answers) == self.members or self._gone)
                self._under_way = self._revocable = 0
                if self._gone:
                    raise OutOfMemory("a rank of the engine has ended")
                if self._called_off == number:
                    raise CalledOff("somebody else was given what the engine was about to take")
                refusals = {rank: why for rank, why in self._answers.items() if why is not None}
            if not refusals:
                return
            self._broadcast(line.Undo(number))
            rank, why = min(refusals.items())
            raise OutOfMemory(f"rank {rank} of {self.members} was refused, so none grows: {why}")

    def settle(self) -> None:
        """Waits until every rank has carried out what was ordered, where no step is under way.

        Raises:
            OutOfMemory: a rank has ended.
        """
        self.ensure(())

    def call_off(self) -> None:
        """Has a growth that is under way come to nothing: what some ranks have of it goes at once."""
        with self._answered:
            if self._revocable > self._called_off:
                self._called_off = self._revocable
                self._broadcast(line.Undo(self._revocable))

    def release(self, chunks: Iterable[int]) -> None:
        """Lets memory go on every rank, after all steps that have been scheduled so far."""
        parked = list(chunks)
        if not parked:
            return
        with self._lock:
            given = self.freed(parked)
            self._yielded += given
            self._broadcast(line.Release(parked, self._step, given))

    def going(self) -> Iterable[int]:
        """Each rank knows its own, and waits for it to go."""
        return ()

    def missing(self, target: int) -> int:
        """Chunks still to be given up until so many have been."""
        with self._lock:
            return target - self._yielded

    def close(self) -> None:
        """No rank is heard or told anything any more. Harmless the second time."""
        self._end()
        for each in self._lines:
            each.close()
        with self._lock:
            desks = list(self._desks.values())
        for desk in desks:
            desk.remove()

    def _broadcast(self, message: line.Message) -> None:
        for each in self._lines:
            each.send(message)

    def _hear(self, rank: int, caller: Line) -> None:
        try:
            for message in caller.messages():
                self._heed(rank, caller, message)
        finally:
            self._end()

    def _heed(self, rank: int, caller: Line, message: line.Message) -> None:
        if isinstance(message, line.Grown):
            with self._answered:
                if message.number == self._under_way:
                    self._answers[rank] = message.refusal
                    self._answered.notify_all()
        elif isinstance(message, line.Demand):
            with self._lock:
                desk = self._desks[message.rung]
            desk.put(message, caller)

    def _end(self) -> None:
        with self._answered:
            self._gone = True
            self._answered.notify_all()


def agreed(hellos: Sequence[line.Hello]) -> int:
    """The blocks of a chunk of all ranks: no fewer than any wants.

    Stages of a pipeline differ in what a block takes. Where one has extents that no two of its chunks share,
    as large as a chunk, chunks of all are so many whole ones of it: or they would lie across them.
    """
    whole = math.lcm(*(hello.chunk_blocks for hello in hellos if hello.apart))
    return -(-max(hello.chunk_blocks for hello in hellos) // whole) * whole


class Desk:
    """Where demands of one rung are answered, one after the other.

    A demand says how many chunks it wants to have been given up since the beginning. So ranks that are asked
    at once, as by another engine with as many ranks, do not have the same bytes given up twice.
    """

    def __init__(self, fn: Callable[[int, float], object], rung: str, ranks: Ranks) -> None:
        self._fn = fn
        self._ranks = ranks
        self._waiting: queue.SimpleQueue[tuple[line.Demand, Line, float] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"tem-{rung}", daemon=True).start()

    def put(self, demand: line.Demand, caller: Line) -> None:
        """A rank wants something."""
        self._waiting.put((demand, caller, time.monotonic() + demand.timeout))

    def remove(self) -> None:
        """Nothing is answered any more. Harmless the second time."""
        self._waiting.put(None)

    def _run(self) -> None:
        while (next_one := self._waiting.get()) is not None:
            demand, caller, deadline = next_one
            wanted = self._ranks.missing(demand.target)
            left = deadline - time.monotonic()
            try:
                if wanted > 0 and left > 0:
                    if not demand.own:
                        # What one rank has of it and others wait for could not be given otherwise.
                        self._ranks.call_off()
                    self._fn(wanted * self._ranks.freed_bytes, left)
            except Exception:
                log.exception("a demand on the engine's memory is not met")
            caller.send(line.Served(demand.number))
