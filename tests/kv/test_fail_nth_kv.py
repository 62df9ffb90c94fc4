"""Whichever driver call fails, a cache and its pool are as they were, and all comes back in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import torch_elastic_mem as tem
from tests.arena.watch import comes_true
from tests.rungs import FakeRung, MiB

pytestmark = pytest.mark.rungs("fake")
G = 2 * MiB
CODES = [2, 999]  # out of memory, unknown


class World:
    """A cache with a pool, and some blocks in use: extents half full, one idle."""

    def __init__(self, rung: FakeRung, layout: str, keep: int) -> None:
        self.rung = rung
        self.arena = rung.arena(40 * G, reserve=(0, 2 * G))
        self.account = self.arena.account("serving")
        self.kv = tem.ElasticKVTensor(
            *(self.account, 24, (G // 8,), torch.int16),
            layers=2 if layout == "layer" else None,
            layout=layout,
            keep=keep,
        )
        self.pool = tem.BlockPool(self.kv)
        self.live = self.pool.allocate(12)
        for block in self.live:
            self.write(block)
        gone = [self.live[1], self.live[3], self.live[5], self.live[6], self.live[7]]
        self.pool.free(gone)
        self.live = [block for block in self.live if block not in gone]
        self.outside = [22, 23]  # held by ensure(), not by the pool
        self.kv.ensure(self.outside)

    def write(self, block: int) -> None:
        for tensor in self.kv.tensors:
            tensor[block, 0] = tensor[block, -1] = block + 1

    def check(self) -> None:
        """What holds whatever has failed."""
        # Two looks: the arena's thread may be taking back, between them, what a failed query left waiting.
        assert comes_true(lambda: self.account.held == self.kv.resident_bytes)
        assert self.kv.live_bytes == (len(self.live) + len(self.outside)) * self.kv.block_bytes
        assert self.pool.num_live == len(self.live)
        assert all(self.kv.is_resident(block) for block in self.live + self.outside)
        for block in self.live:
            assert all(int(t[block, 0]) == int(t[block, -1]) == block + 1 for t in self.kv.tensors)

    def close(self) -> None:
        self.rung.fail_nth(0)
        self.check()
        self.pool.free(self.live)
        self.kv.release(self.outside)
        self.arena.collect()
        self.account.trim()
        assert self.account.held == 0
        assert self.arena.snapshot().lost == 0
        self.kv.close()
        self.account.close()
        self.arena.close()
        del self.kv, self.pool  # the addresses go with the last of them
        assert self.rung.live() == self.rung.before


def ensure(world: World) -> None:
    world.kv.ensure([5, 6, 13, 20, 21])
    world.outside += [5, 6, 13, 20, 21]


def release(world: World) -> None:
    world.kv.release(world.outside)
    world.outside = []


def allocate(world: World) -> None:
    world.live += (new := world.pool.allocate(9))
    for block in new:
        world.write(block)


def free(world: World) -> None:
    gone, rest = world.live[:3], world.live[3:]
    world.pool.free(gone)
    world.live = rest


def compact(world: World) -> None:
    plan = world.pool.plan_compaction()
    assert plan
    try:
        world.kv.copy_blocks(plan.copies)
        plan.commit()
    except tem.TemError:
        world.rung.fail_nth(0)
        plan.abort()
        raise
    for source, target in plan.copies:
        world.live[world.live.index(source)] = target
        world.write(target)


def give_up(world: World) -> None:
    plan = world.pool.plan_compaction()
    try:
        plan.abort()
    except tem.TemError:
        world.rung.fail_nth(0)
        plan.abort()
        raise


def trim(world: World) -> None:
    world.account.trim()


OPERATIONS: list[Callable[[World], None]] = [ensure, release, allocate, free, compact, give_up, trim]


@pytest.fixture(params=["block", "layer"])
def layout(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield request.param


@pytest.mark.parametrize("keep", [0, 8 * G])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_failing_call_leaves_all_as_it_was(
    rung: FakeRung, layout: str, operation: Callable[[World], None], code: int, keep: int
) -> None:
    n, reached = 0, True
    while reached:
        n += 1
        world = World(rung, layout, keep)
        # Only this operation's own calls are counted: nobody else runs while extents wait for nothing.
        world.arena.refill()
        failed = False
        rung.fail_nth(n, code)
        try:
            operation(world)
        except (tem.OutOfMemory, tem.DriverError) as error:
            assert str(error)
            failed = True
            rung.fail_nth(0)
            world.check()
            operation(world)
        reached = failed or rung.calls() >= n
        world.close()
    assert n > 2 or operation is trim


def test_a_cache_that_cannot_be_made_leaves_nothing(rung: FakeRung, layout: str) -> None:
    world = World(rung, layout, 0)
    world.arena.refill()
    before = rung.live()
    options: Any = {"layers": 3, "layout": layout}
    for n in range(1, 10):
        rung.fail_nth(n, 999)
        try:
            made = tem.ElasticKVTensor(world.account, 24, (G,), torch.uint8, **options)
        except tem.DriverError:
            assert rung.live() == before
        else:
            rung.fail_nth(0)
            made.close()
            del made
            break
    assert n == (2 if layout == "block" else 4), "one reservation a stripe"
    world.close()


def test_a_close_that_fails_leaves_it_open(rung: FakeRung, layout: str) -> None:
    world = World(rung, layout, 0)
    other = tem.ElasticKVTensor(world.account, 4, (G,), torch.uint8)
    other.ensure([1])
    other.tensor[1, 0] = 9
    world.arena.refill()  # nobody else calls the driver then
    rung.fail_nth(1, 999)
    with pytest.raises(tem.DriverError):
        other.close()
    assert int(other.tensor[1, 0]) == 9
    other.ensure([2])
    other.close()
    del other
    world.close()
