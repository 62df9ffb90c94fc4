"""Many threads on a small arena: sums stay right, nobody hangs, and everything is there again at the end."""

from __future__ import annotations

import random
import threading

import pytest

import torch_elastic_mem as tem
from tests.arena.watch import EXTENT, MiB, assert_balanced, comes_true
from tests.rungs import Rung
from torch_elastic_mem.elastic_range import ElasticRange
from torch_elastic_mem.errors import OutOfMemory

THREADS = 6
STEPS = 60


class Tenant:
    """Grows and shrinks at random, yields when asked, and checks that its memory stays its own."""

    def __init__(self, rung: Rung, arena: tem.Arena, number: int) -> None:
        self.rung = rung
        self.random = random.Random(number)
        self.mark = bytes([number + 1]) * 64
        priority = ("idle", "training", "serving")[number % 3]
        self.account = arena.account(f"tenant {number}", priority, min=EXTENT if number == 0 else 0)
        self.lock = threading.Lock()  # the owner of a range says who may change it
        self.memory = self.account.range(32 * MiB, keep=self.random.choice([0, 4 * MiB]))
        self.stream = rung.stream()
        self.refused = 0
        self.account.on_reclaim(self.give, rung=self.random.choice(["evict", "spill", "pause"]))

    def give(self, nbytes: int, timeout: float) -> None:
        # A demand of its own may be under way on this or another thread: then there is nothing safe to give.
        if self.lock.acquire(timeout=0.01):
            try:
                if self.memory.mapped:
                    self.memory.shrink(min(nbytes, self.memory.mapped), stream=self.stream.handle)
            finally:
                self.lock.release()

    def grow(self) -> None:
        nbytes = self.random.randint(1, 4) * EXTENT
        with self.lock:
            if self.memory.mapped + nbytes > 32 * MiB:
                return
            start = self.memory.mapped
            try:
                # Zeroed on the stream that write() copies on: on another, the memset may come after the copy.
                self.memory.grow(nbytes, stream=0, timeout=0.02)
            except OutOfMemory:
                self.refused += 1
                assert self.memory.mapped == start
                return
            for offset in range(start, self.memory.mapped, EXTENT):
                self.rung.write(self.memory.address + offset, self.mark)

    def shrink(self) -> None:
        with self.lock:
            for offset in range(0, self.memory.mapped, EXTENT):
                assert self.rung.read(self.memory.address + offset, 64) == self.mark
            if self.memory.mapped:
                self.stream.submit()
                self.memory.shrink(self.random.randint(1, self.memory.mapped), stream=self.stream.handle)
                self.stream.complete()

    def step(self) -> None:
        act = self.random.random()
        if act < 0.5:
            self.grow()
        elif act < 0.85:
            self.shrink()
        elif act < 0.9:
            self.account.trim()
        elif act < 0.95:
            self.account.set_limits(weight=self.random.uniform(0.5, 2.0), timeout=0.0)
        else:
            self.account.wait(EXTENT, 0.002)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("reserve", [(0, 0), (2 * MiB, 6 * MiB)])
def test_random_demands_of_random_classes_end_with_everything_back(
    rung: Rung, reserve: tuple[int, int]
) -> None:
    arena = rung.arena(24 * MiB, reserve=reserve)
    tenants = [Tenant(rung, arena, number) for number in range(THREADS)]
    failures: list[BaseException] = []
    running = threading.Event()
    running.set()

    def work(tenant: Tenant) -> None:
        try:
            for _ in range(STEPS):
                tenant.step()
        except BaseException as error:  # noqa: BLE001  (reported by the main thread)
            failures.append(error)

    def watch() -> None:
        try:
            while running.is_set():
                now = arena.snapshot()
                assert now.leased == sum(account.held for account in now.accounts)
                assert now.leased <= now.capacity - now.reserve_low
                arena.collect()
                arena.yields(since=0)
        except BaseException as error:  # noqa: BLE001  (reported by the main thread)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(tenant,)) for tenant in tenants]
    watcher = threading.Thread(target=watch)
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.clear()
    watcher.join()
    assert not failures, failures
    now = arena.snapshot()
    assert sum(account.given for account in now.accounts) >= sum(account.taken for account in now.accounts)
    for tenant in tenants:
        tenant.memory.close()
    assert comes_true(lambda: arena.snapshot().leased == 0)
    assert_balanced(arena)
    for tenant in tenants:
        tenant.account.close()
    arena.close()
    assert sum(tenant.refused for tenant in tenants) < THREADS * STEPS


@pytest.mark.timeout(60)
def test_two_accounts_that_demand_from_each_other_do_not_hang(rung: Rung) -> None:
    arena = rung.arena(8 * MiB)
    ranges = []
    for name in ("first", "second"):
        account = arena.account(name, "training", min=2 * MiB)
        memory = account.range(16 * MiB)
        memory.grow(4 * MiB)
        ranges.append(memory)
    first, second = ranges
    demands = [threading.Thread(target=refused, args=(memory,)) for memory in ranges]
    for demand in demands:
        demand.start()
    for demand in demands:
        demand.join(10)
        assert not demand.is_alive()
    assert (first.mapped, second.mapped) == (4 * MiB, 4 * MiB)


def refused(memory: ElasticRange) -> None:
    with pytest.raises(OutOfMemory):
        memory.grow(4 * MiB, timeout=0.1)
