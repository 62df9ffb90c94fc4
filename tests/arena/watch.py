"""What tests of the arena look at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch_elastic_mem as tem
from tests.rungs import FakeRung, Rung, Stream
from torch_elastic_mem.elastic_range import ElasticRange

MiB = 1 << 20
EXTENT = 2 * MiB


def filled(account: tem.Account, nbytes: int, *, keep: int = 0, stream: int = 0) -> ElasticRange:
    """A range with memory under all of it, in extents of one granule."""
    made = account.range(nbytes, keep=keep, extent=EXTENT)
    made.grow(nbytes, stream=stream)
    return made


def kept_idle(account: tem.Account, nbytes: int) -> ElasticRange:
    """A range on which nothing lives and whose memory stays until somebody needs it."""
    made = filled(account, nbytes, keep=nbytes)
    made.shrink(nbytes)
    assert account.held >= nbytes
    return made


def calls(rung: FakeRung, name: str) -> int:
    """How often an entry point of the fake driver has been called."""
    return int(rung.driver.fake_cuda_count(name.encode()))


@dataclass(frozen=True)
class Books:
    """All that an operation which failed must leave as it was."""

    leased: int
    free: int
    spare: int
    created: int
    lost: int
    held: tuple[tuple[str, int], ...]
    driver: tuple[int, ...]


def books(rung: Rung, arena: tem.Arena) -> Books:
    now = arena.snapshot()
    return Books(
        leased=now.leased,
        free=now.free,
        spare=now.spare,
        created=now.created,
        lost=now.lost,
        held=tuple((account.name, account.held) for account in now.accounts),
        driver=rung.live() if isinstance(rung, FakeRung) else (),
    )


def assert_balanced(arena: tem.Arena) -> None:
    """With no growth under way, physical memory is what is leased and what is spare."""
    now = arena.snapshot()
    assert now.leased == sum(account.held for account in now.accounts)
    assert now.created == now.leased + now.spare + now.lost
    assert now.leased <= now.capacity - now.reserve_low
    assert now.free == now.capacity - now.reserve_low - now.leased


class Completion(threading.Thread):
    """Completes a stream after a while. `begun` is set before the stream is done."""

    def __init__(self, stream: Stream, seconds: float) -> None:
        super().__init__()
        self.begun = threading.Event()
        self._stream = stream
        self._seconds = seconds
        self.start()

    def run(self) -> None:
        time.sleep(self._seconds)
        self.begun.set()
        self._stream.complete()


def comes_true(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether a condition that another thread brings about holds within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


class Pair:
    """Training holds all of 16 MiB; serving wants some."""

    def __init__(self, rung: Rung, timeout: float = 1.0) -> None:
        self.arena = rung.arena(16 * MiB, yield_timeout=timeout)
        self.training = self.arena.account("training", "training")
        self.serving = self.arena.account("serving", "serving")
        self.old = filled(self.training, 16 * MiB)
        self.new = self.serving.range(16 * MiB)

    def give(self, nbytes: int, timeout: float) -> None:
        self.old.shrink(min(nbytes, self.old.mapped))
