"""Blocks that move, over vLLM's own pool and an arena: what is in them, who holds them, what comes free."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import torch_elastic_mem as tem
from tests.vllm.pools import cached, fill, find, free_ids, leave
from tests.vllm.small_engine import BLOCKS, CHUNK, LONG, Demand, Engine
from torch_elastic_mem.integrations.vllm.cache import BlockTables
from torch_elastic_mem.integrations.vllm.controller import Demand as Wanted
from torch_elastic_mem.integrations.vllm.demand import Needs
from torch_elastic_mem.integrations.vllm.mover import Mover

pytestmark = pytest.mark.timeout(60)


class Runner:
    """Has block tables as a model runner has: told of what is new, and of what has moved."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tables: dict[int, list[int]] = {}
        self.told: list[BlockTables] = []
        engine.cache.on_moved = self.moved
        self.stepping = True
        engine.controller.mover = Mover(
            engine.cache, engine.balloon, self.holding, stepping=lambda: self.stepping
        )

    def holding(self, blocks: Collection[int]) -> BlockTables:
        tables = {id(held): [block.block_id for block in held] for held in self.engine.requests}
        return {str(request): (table,) for request, table in tables.items() if set(blocks) & set(table)}

    def moved(self, tables: BlockTables) -> None:
        self.told.append(tables)
        for request, (table,) in tables.items():
            assert len(table) == len(self.tables[int(request)])
            self.tables[int(request)] = table

    def learn(self) -> None:
        """Of new requests, as a step tells it."""
        for held in self.engine.requests:
            self.tables.setdefault(id(held), [block.block_id for block in held])


@pytest.fixture
def runner(full: Engine) -> Runner:
    return Runner(full)


def write(engine: Engine, block: int, content: int) -> None:
    ((part, _),) = engine.cache._parts
    part.tensors[0][block, 0] = content % 128
    part.tensors[0][block, -1] = content % 127


def reads(engine: Engine, block: int, content: int) -> bool:
    ((part, _),) = engine.cache._parts
    found = part.tensors[0][block, 0].item(), part.tensors[0][block, -1].item()
    return found == (content % 128, content % 127)


class Moving(RuleBasedStateMachine):
    """Requests come, share, fill and go; chunks are parked, emptied and unparked."""

    @initialize(resident=st.integers(1, BLOCKS // 2))
    def open(self, resident: int) -> None:
        self.engine = Engine(resident)
        self.runner = Runner(self.engine)
        self.wants: dict[int, list[int]] = {}  # what each request has in its blocks
        self.cached: dict[int, int] = {}  # of contents that the prefix cache was told: how many blocks
        self.contents = 0

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.controller.close()

    def start(self, held: list[Any], wants: list[int]) -> None:
        self.engine.requests.append(held)
        self.wants[id(held)] = wants
        self.runner.learn()

    @rule(count=st.integers(1, 5))
    def allocate(self, count: int) -> None:
        held = self.engine.pool.get_new_blocks(min(count, self.engine.pool.get_num_free_blocks()))
        wants = []
        for block in held:
            self.contents += 1
            write(self.engine, block.block_id, self.contents)
            wants.append(self.contents)
        if held:
            self.start(held, wants)

    @precondition(lambda self: self.engine.requests)
    @rule(which=st.integers(0), twin=st.booleans())
    def fill(self, which: int, twin: bool) -> None:
        """A block is full, and known to the prefix cache; perhaps two have the same in them."""
        held = self.engine.requests[which % len(self.engine.requests)]
        block, content = held[0], self.wants[id(held)][0]
        if block.block_hash is not None:
            return
        if twin and self.cached:
            content = min(self.cached)
            write(self.engine, block.block_id, content)
            self.wants[id(held)][0] = content
        fill(self.engine.pool, block, content)
        self.cached[content] = self.cached.get(content, 0) + 1

    @precondition(lambda self: self.cached)
    @rule(which=st.integers(0))
    def hit(self, which: int) -> None:
        content = sorted(self.cached)[which % len(self.cached)]
        if (block := find(self.engine.pool, content)) is not None:
            self.engine.pool.touch([block])
            self.start([block], [content])

    @precondition(lambda self: self.engine.requests)
    @rule(which=st.integers(0))
    def finish(self, which: int) -> None:
        held = self.engine.requests.pop(which % len(self.engine.requests))
        del self.wants[id(held)], self.runner.tables[id(held)]
        self.engine.pool.free_blocks(reversed(held))

    @rule(count=st.integers(1, 4))
    def give_and_move(self, count: int) -> None:
        engine, controller = self.engine, self.engine.controller
        before, free = engine.cache.resident_bytes, engine.balloon.free_blocks
        with controller.lock:
            wanted = Wanted(count * CHUNK, "pause", LONG)
            given = controller._give_to(wanted)
            moved = controller._compact(wanted)
        assert engine.cache.resident_bytes == before - given - moved
        # A chunk's worth of free blocks is a chunk that can go, but for the first one.
        assert given + moved >= min(count, free // 2, before // CHUNK - 1) * CHUNK
        assert engine.preempted_by == []

    @rule(count=st.integers(1, 3))
    def grow(self, count: int) -> None:
        chunks = self.engine.balloon.next_out(count)
        self.engine.cache.ensure(chunks)
        self.engine.balloon.unpark(chunks)

    @invariant()
    def every_request_finds_its_own_in_its_runners_table(self) -> None:
        for held in self.engine.requests:
            table = self.runner.tables[id(held)]
            assert table == [block.block_id for block in held]
            for block, content in zip(table, self.wants[id(held)], strict=True):
                assert reads(self.engine, block, content)

    @invariant()
    def what_the_prefix_cache_finds_is_what_was_left_there(self) -> None:
        for content in self.cached:
            if (block := find(self.engine.pool, content)) is not None:
                assert self.engine.pool.blocks[block.block_id] is block
                assert reads(self.engine, block.block_id, content)

    @invariant()
    def a_block_is_where_its_number_says(self) -> None:
        pool = self.engine.pool
        assert [block.block_id for block in pool.blocks] == list(range(BLOCKS))
        held = [block.block_id for request in self.engine.requests for block in request]
        assert not set(held) & set(free_ids(pool))
        assert all(pool.blocks[block].ref_cnt == held.count(block) for block in set(held))
        assert not self.engine.without_memory() & ({0, *free_ids(pool)} | set(held))


TestMoving = Moving.TestCase
TestMoving.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.fixture
def sparse(full: Engine, runner: Runner) -> Iterator[Engine]:
    """One request has a block on every second chunk, from the second on."""
    full.hold(*range(4, BLOCKS, 4))
    runner.learn()
    yield full
    full.assert_sound()


def test_what_has_been_given_by_moves_is_not_owed_any_more(full: Engine, runner: Runner) -> None:
    for block in (1, *range(2, BLOCKS, 2)):
        full.hold(block)
    runner.learn()
    full.needs = Needs(BLOCKS, BLOCKS, BLOCKS)  # at the rung shrink all that is free stays
    demand = Demand(full, 2 * CHUNK)
    assert demand.waits("pause") and full.controller.draining
    full.step()
    assert demand.ended() and full.preempted_by == []
    assert not full.controller.draining
    full.assert_sound()


def test_sparse_chunks_are_emptied_before_the_next_step_and_nobody_is_preempted(
    sparse: Engine, runner: Runner
) -> None:
    idle = BLOCKS // 4
    demand = Demand(sparse, (idle + 2) * CHUNK)
    assert demand.waits("evict"), "what is idle does not suffice"
    assert sparse.balloon.parked == idle
    sparse.step()
    assert demand.ended() is True
    assert (sparse.preempted_by, sparse.balloon.parked) == ([], idle + 2)
    assert len(runner.told) == 1


def ask(engine: Engine, rung: str, chunks: int) -> threading.Thread:
    """Somebody asks for so much and waits."""
    asking = threading.Thread(target=engine.controller._asked, args=(rung, chunks * CHUNK, LONG))
    asking.start()
    while engine.demands() != [rung]:
        assert asking.is_alive()
    return asking


# Who may cost no more than what is cached, and who may cost admissions.
CHEAP = pytest.mark.parametrize("price", ["evict", "shrink"])


@CHEAP
def test_who_may_not_preempt_gets_what_blocks_that_move_leave(
    price: str, sparse: Engine, runner: Runner
) -> None:
    asking = ask(sparse, price, 10)
    sparse.step()
    asking.join()
    assert sparse.cache.resident_bytes == 6 * CHUNK
    assert sparse.preempted_by == []


@pytest.mark.parametrize("why", ["all requests have ended", "the engine is paused"])
def test_who_waits_for_a_step_waits_no_longer_once(why: str, sparse: Engine, runner: Runner) -> None:
    asking = ask(sparse, "evict", 15)
    if why == "the engine is paused":
        runner.stepping = False
    else:
        sparse.pool.free_blocks(sparse.requests.pop())
    sparse.controller.reconsider()
    asking.join()
    assert sparse.cache.resident_bytes == CHUNK * (1 if not sparse.requests else 8)


@pytest.mark.parametrize("why", ["no step is to come", "blocks cannot move"])
def test_who_may_not_preempt_does_not_wait_where(why: str, sparse: Engine, runner: Runner) -> None:
    if why == "no step is to come":
        runner.stepping = False
    else:
        sparse.controller.mover = None
    sparse.controller._asked("evict", 15 * CHUNK, LONG)
    assert sparse.balloon.parked == BLOCKS // 4
    assert runner.told == []


@CHEAP
def test_what_requests_are_about_to_take_is_left_to_them(price: str, sparse: Engine, runner: Runner) -> None:
    sparse.needs = Needs(2, 2, 5)
    asking = ask(sparse, price, 15)
    sparse.step()
    asking.join()
    left = sparse.needs.most if price == "evict" else sparse.needs.running
    assert left <= sparse.balloon.free_blocks < left + 2
    assert sparse.preempted_by == []


def test_a_demand_is_preempted_for_only_where_moving_does_not_suffice(sparse: Engine) -> None:
    sparse.hold(1, 5, 9)
    demand = Demand(sparse, 12 * CHUNK)
    assert demand.waits("evict")
    sparse.step()
    assert demand.waits("pause")
    assert (sparse.preempted_by, sparse.balloon.parked) == ([], 10), "ten blocks and the null block on six"
    sparse.step()
    assert demand.ended() is True
    assert (len(sparse.preempted_by), sparse.balloon.parked) == (1, 12)


def test_while_a_step_is_not_on_the_stream_nothing_moves(sparse: Engine, runner: Runner) -> None:
    sparse.scheduled()
    demand = Demand(sparse, 10 * CHUNK)
    for rung in ("evict", "shrink", "pause"):
        assert demand.waits(rung)
        sparse.step()
    assert demand.ended() is True
    assert (runner.told, len(sparse.preempted_by)) == ([], 1)


def test_a_block_that_several_hold_moves_for_all_of_them(full: Engine, runner: Runner) -> None:
    full.hold(24, 22)
    fill(full.pool, full.pool.blocks[24], 7)
    write(full, 24, 7)
    full.hold(24, 20)
    runner.learn()
    with full.controller.lock:
        full.controller._give(BLOCKS * CHUNK, 0)
        assert full.controller._compact(Wanted(2 * CHUNK, "pause", LONG)) == 2 * CHUNK
    (told,) = runner.told
    first, second = (told[str(id(held))][0] for held in full.requests)
    assert first[0] == second[0] != 24
    assert reads(full, first[0], 7)
    found = find(full.pool, 7)
    assert (found.block_id, found.ref_cnt) == (first[0], 2)
    for held in (full.requests.pop(), full.requests.pop()):
        full.pool.free_blocks(held)
    assert cached(full.pool, 7), "its prefix is warm when both have gone"


def test_what_was_cached_where_a_block_goes_is_forgotten(full: Engine) -> None:
    for block in (3, 4):
        leave(full.pool, [block], content=7)
    full.hold(9)
    with full.controller.lock:
        full.balloon.move([(9, 3)])
    assert [block.block_id for block in full.requests[0]] == [3]
    assert find(full.pool, 7) is full.pool.blocks[4]
    full.pool.evict_blocks({4})
    assert not cached(full.pool, 7)


def test_the_chunk_of_the_null_block_stays_though_it_is_the_emptiest(full: Engine, runner: Runner) -> None:
    full.hold(2)
    leave(full.pool, [3])
    runner.learn()
    asking = ask(full, "evict", BLOCKS)
    full.step()
    asking.join()
    assert [block.block_id for block in full.requests[0]] == [1]
    assert full.balloon.resident() == [0]
    full.assert_sound()


def test_what_is_read_is_never_the_place_that_memory_has_left(sparse: Engine, runner: Runner) -> None:
    for block in range(4, BLOCKS, 4):
        write(sparse, block, block)
    with sparse.controller.lock:
        sparse.controller._give(BLOCKS * CHUNK, 0)
        sparse.controller._compact(Wanted(3 * CHUNK, "pause", LONG))
    other = sparse.arena.account("other", tem.PriorityClass("other", 10**6)).range("64MiB")
    other.grow(sparse.arena.capacity - sparse.cache.resident_bytes, timeout=LONG)
    table = runner.tables[id(sparse.requests[0])]
    assert all(reads(sparse, block, was) for block, was in zip(table, range(4, BLOCKS, 4), strict=True))
    other.close()
