"""Whichever driver call fails, within pools, captures and checkpoints: blocks and books stay as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import torch_elastic_mem as tem
from tests.alloc.home import Home
from tests.alloc.mirror import G, KiB, Mirror
from tests.arena.watch import comes_true
from tests.rungs import FakeRung
from torch_elastic_mem import _C

pytestmark = pytest.mark.rungs("fake")
POOL = (1, 0)


class Load:
    """A pool with blocks and, step by step, what is done to them. A step that fails has done nothing."""

    def __init__(self, rung: FakeRung) -> None:
        self.home = Home(rung)
        self.heap = self.home.heap
        self.mirror = Mirror(_C.MallocRecorder(self.heap))
        self.mine, self.reader = rung.stream(), rung.stream()
        self.heap.create_pool(POOL)
        self.heap.begin_pool(POOL, {self.mine.handle})
        self.inside = [self.heap.allocate(n, self.mine.handle) for n in (700, 200 * KiB, 3 * G)]
        self.checkpoint = self.heap.live_in(POOL)
        self.outside = [self.heap.allocate(G, 0) for _ in range(3)]

    def grow(self) -> None:
        self.inside.append(self.heap.allocate(5 * G, self.mine.handle))

    def share(self) -> None:
        self.heap.record_stream(self.outside[-1], self.reader.handle)
        self.heap.free(self.outside.pop())

    def drop(self) -> None:
        self.heap.free(self.outside.pop())

    def end(self) -> None:
        if self.heap.pool_uses(POOL) == 2:
            self.heap.end_pool(POOL)
            self.heap.release_pool(POOL)

    def restore(self) -> None:
        self.heap.restore(POOL, self.checkpoint)
        self.inside = [one[0] for one in self.checkpoint]

    def leave(self) -> None:
        while self.inside:
            self.heap.free(self.inside.pop())
        if self.heap.pool_uses(POOL):
            self.heap.release_pool(POOL)

    def steps(self) -> list[Callable[[], object]]:
        trim, empty = self.home.account.trim, self.heap.empty_cache
        inside = [self.grow, self.share, self.drop, trim, self.end]
        return [*inside, self.restore, trim, empty, self.leave, empty]

    def check(self) -> None:
        while True:  # the arena's thread may be at work on the released pool
            self.mirror.catch_up()
            stats, segments = self.heap.stats(), self.heap.segments()
            if not self.mirror.catch_up():
                break
        self.mirror.check(stats, segments)
        assert self.mirror.live.keys() == {*self.inside, *self.outside}

    def close(self) -> None:
        for address in self.outside:
            self.heap.free(address)
        self.heap.close()
        assert comes_true(lambda: self.home.account.held == 0)
        self.home.account.close()
        now = self.home.arena.snapshot()
        assert now.created == now.lost == 0
        self.home.arena.close()


@pytest.mark.parametrize("code", [2, 999])
def test_every_failing_driver_call_of_a_pools_life_leaves_all_as_it_was(rung: FakeRung, code: int) -> None:
    n, reached = 0, True
    while reached:
        n += 1
        load, failed = Load(rung), False
        rung.fail_nth(n, code)
        for step in load.steps():
            try:
                step()
            except (tem.OutOfMemory, tem.DriverError):
                load.check()
                failed = True
                rung.fail_nth(0)
                step()
            load.check()
        reached = failed or rung.calls() >= n
        rung.fail_nth(0)
        load.close()
        del load, step
    assert n > 20


def test_a_released_pools_extent_that_the_driver_keeps_goes_with_a_later_try(rung: FakeRung) -> None:
    home = Home(rung)
    with home.pool(POOL):
        home.heap.free(home.heap.allocate(G, 0))
    for n in range(1, 20):
        rung.fail_nth(n, 999)
        if n == 1:
            home.heap.release_pool(POOL)
        home.arena.snapshot()
    rung.fail_nth(0)
    assert comes_true(lambda: home.account.held == 0)
    home.heap.free(home.heap.allocate(G, 0))
    home.close()
