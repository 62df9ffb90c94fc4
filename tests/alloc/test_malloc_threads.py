"""Many threads in one malloc while a rival demands memory: blocks stay theirs, and all sums are right."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

import torch_elastic_mem as tem
from tests.alloc.home import Home
from tests.alloc.mirror import G, KiB, MiB, Mirror
from tests.rungs import Rung, Stream
from torch_elastic_mem import _C

ROUNDS = 90
CAPACITY = 24 * G


class Worker:
    """Allocates, shares and frees at random, within a pool of its own for a while, and checks its blocks."""

    def __init__(self, rung: Rung, home: Home, number: int, streams: list[Stream]) -> None:
        self.rung, self.heap, self.streams = rung, home.heap, streams
        self.random = random.Random(number)
        self.mark = bytes([number + 1])
        self.pool = (number + 1, 0)
        self.own = rung.stream()
        self.live: list[tuple[int, int]] = []

    def allocate(self) -> None:
        nbytes = self.random.choice([1, 600, 5 * KiB, 40 * KiB, 700 * KiB, MiB + 1, G])
        stream = self.random.choice([self.own, *self.streams])
        try:
            address = self.heap.allocate(nbytes, stream.handle)
        except tem.OutOfMemory:
            return
        for at in (address, address + nbytes - 1):
            self.rung.write(at, self.mark)
        self.live.append((address, nbytes))
        if self.random.random() < 0.2:
            self.heap.record_stream(address, self.random.choice(self.streams).handle)

    def free(self, i: int) -> None:
        address, nbytes = self.live.pop(i)
        for at in (address, address + nbytes - 1):
            assert self.rung.read(at, 1) == self.mark
        self.heap.free(address)

    def __call__(self) -> None:
        for number in range(ROUNDS):
            if number == ROUNDS // 3:
                self.heap.begin_pool(self.pool, {self.own.handle})
            if number == ROUNDS // 2:
                self.heap.end_pool(self.pool)
            if number == 2 * ROUNDS // 3:
                self.heap.release_pool(self.pool)
            self.allocate()
            while len(self.live) > 5:
                self.free(self.random.randrange(len(self.live)))
        while self.live:
            self.free(0)


@pytest.mark.timeout(60)
def test_blocks_of_many_threads_stay_theirs_while_a_rival_takes_what_is_idle(rung: Rung) -> None:
    home = Home(rung, CAPACITY)
    rival = home.arena.account("serving", "serving")
    wanted = _C.BlockRange(rival._core, "what serving wants", CAPACITY // G, G)
    mirror = Mirror(_C.MallocRecorder(home.heap))
    streams = [rung.stream() for _ in range(2)]
    failures: list[BaseException] = []
    running = threading.Event()
    running.set()

    def guarded(body: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                body()
            except BaseException as error:  # noqa: BLE001  (told by the main thread)
                failures.append(error)

        return run

    def disturb() -> None:
        while running.is_set():
            streams[0].submit()
            home.account.trim()
            try:
                wanted.ensure(range(6), 0, 0.0)
                wanted.release(range(6), 0)
            except tem.OutOfMemory:
                pass
            streams[0].complete()
            home.heap.wait_for_streams()
            mirror.catch_up()

    threads = [threading.Thread(target=guarded(Worker(rung, home, n, streams))) for n in range(4)]
    other = threading.Thread(target=guarded(disturb))
    other.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.clear()
    other.join()
    assert not failures, failures
    home.heap.empty_cache()
    mirror.catch_up()
    mirror.check(home.heap.stats(), home.heap.segments())
    assert home.account.held == mirror.mapped == 0
    assert mirror.figure("allocation").allocated > ROUNDS
    wanted.close()
    rival.close()
    home.close()
