"""Whichever driver call fails, a cache and its pool are as they were, and everything comes back in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch_elastic_mem as tem  # noqa: E402
from tests.rungs import MiB, FakeRung  # noqa: E402

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

    def write(self, block: int) -> None:
        for tensor in self.kv.tensors:
            tensor[block, 0] = tensor[block, -1] = block + 1

    def check(self) -> None:
        """What holds whatever has failed."""
        assert self.account.held == self.kv.resident_bytes
        assert self.kv.live_bytes == len(self.live) * self.kv.block_bytes
        assert self.pool.num_live == len(self.live)
        for block in self.live:
            assert self.kv.is_resident(block)
            assert all(int(t[block, 0]) == int(t[block, -1]) == block + 1 for t in self.kv.tensors)

    def close(self) -> None:
        self.rung.fail_nth(0)
        self.check()
        if self.live:
            self.pool.free(self.live)
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
    blocks = [block for block in (5, 6, 13, 20, 21) if block not in world.live]
    world.kv.ensure(blocks)
    world.kv.release(blocks)


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


OPERATIONS: list[Callable[[World], None]] = [ensure, allocate, free, compact, give_up, trim]


@pytest.fixture(params=["block", "layer"])
def layout(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield request.param


@pytest.mark.parametrize("keep", [0, 8 * G])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_failing_call_leaves_all_as_it_was(
    rung: FakeRung, layout: str, operation: Callable[[World], None], code: int, keep: int
) -> None:
    n, failed = 0, 0
    while True:
        n += 1
        world = World(rung, layout, keep)
        # Only this operation's own calls are counted: nobody else runs while extents wait for nothing.
        world.arena.refill()
        rung.fail_nth(n, code)
        try:
            operation(world)
        except (tem.OutOfMemory, tem.DriverError) as error:
            failed += 1
            assert str(error)
            rung.fail_nth(0)
            world.check()
            if operation is not ensure:  # what it ensured may be held when the release fails
                operation(world)
        reached = rung.calls() >= n
        if operation is ensure:
            rung.fail_nth(0)
            outside = [b for b in range(24) if world.kv._core.held(b) and b not in world.live]
            if outside:
                world.kv.release(outside)
        world.close()
        if not reached:
            break
    assert n > 1 or operation in (trim, give_up)
