"""Chunks that share extents at their edges: what comes free with one depends on who is beside it."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch_elastic_mem as tem
from tests.vllm.pools import leave, pool_of
from tests.vllm.small_engine import CHUNK, LONG, MiB
from torch_elastic_mem.integrations.vllm.balloon import Balloon
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.compat import Region
from torch_elastic_mem.integrations.vllm.controller import Controller
from torch_elastic_mem.integrations.vllm.demand import Needs

pytestmark = pytest.mark.timeout(60)
KiB = 1 << 10
BLOCKS = 41


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("block_bytes", [700 * KiB, MiB + MiB // 2, 3 * MiB + 4 * KiB, 5 * MiB + 4 * KiB])
def test_where_chunks_share_extents_it_is_known_what_comes_free(block_bytes: int, layers: int) -> None:
    arena = tem.Arena("host", capacity=1 << 30, reserve=(0, 0), broker=None)
    region = Region(BLOCKS * block_bytes * layers, block_bytes, layers)
    cache = ElasticCache(arena.account("engine", "serving"), BLOCKS, [region])
    assert cache.freed_bytes < cache.chunk_bytes
    rng = random.Random(block_bytes + layers)
    there = set(range(cache.num_chunks))
    cache.ensure(there)
    for _ in range(20):
        chunks = rng.sample(sorted(there), rng.randrange(1, len(there) + 1))
        expected, before = cache.freed(chunks), cache.account.held
        cache.release(chunks)
        assert before - cache.account.held == expected
        there -= set(chunks)
        back = set(rng.sample(range(cache.num_chunks), cache.num_chunks // 2)) - there | {0}
        cache.ensure(back - there)
        there |= back


def test_beside_a_chunk_whose_memory_is_coming_no_more_is_promised_than_comes_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arena = tem.Arena("host", capacity=1 << 30, reserve=(0, 0), broker=None)
    region = Region(BLOCKS * 700 * KiB, 700 * KiB)
    cache = ElasticCache(arena.account("engine", "serving"), BLOCKS, [region])
    cache.ensure([0])
    ((part, _),) = cache._parts
    ensure, promised = part.ensure, []

    def looked_at(*args: Any, **more: Any) -> None:
        promised.append(cache.freed([0]))
        ensure(*args, **more)
        promised.append(cache.freed([0]))

    monkeypatch.setattr(part, "ensure", looked_at)
    cache.ensure([1])
    before = cache.account.held
    cache.release([0])
    assert promised == [before - cache.account.held] * 2
    arena.set_capacity(before)
    with pytest.raises(tem.OutOfMemory):
        cache.ensure(range(2, cache.num_chunks))
    assert cache.freed([1]) == cache.account.held, "who did not come does not stay"


class Odd:
    """An engine whose neighbouring chunks share extents, on an arena that it fills."""

    def __init__(self, blocks: int) -> None:
        nbytes = blocks * 700 * KiB
        self.arena = tem.Arena("host", capacity=-(-nbytes // CHUNK) * CHUNK, reserve=(0, 0), broker=None)
        account = self.arena.account("engine", "serving")
        self.cache = ElasticCache(account, blocks, [Region(nbytes, 700 * KiB)])
        self.cache.ensure(range(self.cache.num_chunks))
        self.pool = pool_of(blocks)
        self.balloon = Balloon(self.pool, self.cache.chunk_blocks, self.cache.num_chunks)
        self.controller = Controller(self.cache, self.balloon, lambda: False, lambda: Needs(0, 0, 0))
        self.pressing = self.arena.account("pressing", tem.PriorityClass("pressing", 10**6)).range("64MiB")

    def rungs(self) -> set[str]:
        return {record.rung for record in self.arena.yields()}


def test_a_demand_is_met_where_the_coldest_chunks_are_scattered(engines: list[Any]) -> None:
    odd = Odd(144)
    engines.append(odd)
    assert odd.cache.num_chunks > 9
    chunks = range(1, odd.cache.num_chunks)
    for chunk in [*chunks[::2], *chunks[1::2]]:
        leave(odd.pool, [block.block_id for block in odd.balloon.of(chunk)])
    odd.pressing.grow(3 * odd.cache.freed_bytes, timeout=LONG)
    assert (odd.rungs(), odd.balloon.parked) == ({"evict"}, 3)


def test_of_neighbours_no_more_go_than_free_what_is_wanted_together(engines: list[Any]) -> None:
    odd = Odd(144)
    engines.append(odd)
    wanted = 5 * odd.cache.chunk_bytes // CHUNK * CHUNK
    assert wanted > 5 * odd.cache.freed_bytes
    odd.pressing.grow(wanted, timeout=LONG)
    assert (odd.rungs(), odd.balloon.parked) == ({"evict"}, 5)


def test_a_short_last_chunk_does_not_count_where_it_frees_less(engines: list[Any]) -> None:
    odd = Odd(49)
    engines.append(odd)
    assert len(odd.balloon.of(odd.cache.num_chunks - 1)) == 1
    odd.pressing.grow(odd.cache.freed_bytes, timeout=LONG)
    assert (odd.rungs(), odd.balloon.parked) == ({"evict"}, 2)
