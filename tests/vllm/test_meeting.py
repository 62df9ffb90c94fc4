"""What the ranks of an engine agree on before it has a cache."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

import torch_elastic_mem as tem
from torch_elastic_mem.integrations.vllm import line
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.compat import Region
from torch_elastic_mem.integrations.vllm.ranks import Ranks, agreed

KiB = 1 << 10


def met(hellos: list[line.Hello | None]) -> tuple[Ranks, list[Any]]:
    """What becomes of ranks that say this; one that says nothing hangs up."""
    ranks, door, answers = Ranks(len(hellos)), line.Door(), []
    for hello in hellos:
        caller = line.call(str(door.path))
        if hello is None:
            caller.close()
        else:
            caller.send(hello)
            answers.append(caller)
    try:
        ranks.meet(door)
        return ranks, [caller.receive() for caller in answers]
    finally:
        door.close()
        ranks.close()


def test_ranks_whose_chunks_differ_take_the_largest() -> None:
    ranks, welcomes = met([line.Hello(1, 40, 8, False), line.Hello(0, 40, 6, False)])
    assert ranks.elastic
    assert [each.chunk_blocks for each in welcomes] == [8, 8]
    assert len({each.group for each in welcomes}) == 1
    assert (ranks.num_blocks, ranks.freed(range(5)), ranks.freed([4])) == (40, 5, 1)


@pytest.mark.parametrize(
    ("chunks", "together"),
    [
        ([(8, True), (8, True)], 8),
        ([(16, True), (18, False)], 32),
        ([(16, True), (7, False), (4, True)], 16),
        ([(5, False), (7, False)], 7),
    ],
)
def test_chunks_of_all_are_whole_ones_of_a_rank_that_shares_no_extents(
    chunks: list[tuple[int, bool]], together: int
) -> None:
    assert agreed([line.Hello(rank, 4096, *each) for rank, each in enumerate(chunks)]) == together


@pytest.mark.parametrize("layers", [(16, 15), (7, 8), (31, 32, 3)])
def test_stages_of_unlike_size_get_back_what_they_gave_between_neighbours(
    layers: tuple[int, ...],
) -> None:
    blocks, caches = 4096, []
    for each in layers:
        block = each * 64 * KiB
        arena = tem.Arena("host", capacity="4GiB", reserve=(0, 0), broker=None)
        account = arena.account("engine", "serving")
        caches.append(ElasticCache(account, blocks, [Region(blocks * block, block)]))
    hellos = [line.Hello(0, blocks, each.chunk_blocks, each.all_apart) for each in caches]
    for cache in caches:
        cache.set_chunks(agreed(hellos))
        assert cache.freed_bytes > 0
        cache.ensure(range(4))
        cache.release([2])
        cache.ensure([2], timeout=1.0)


@pytest.mark.parametrize("other", [line.Hello(1, 0, 0, False), line.Hello(1, 32, 8, True)])
def test_if_one_rank_cannot_be_elastic_none_is(other: line.Hello) -> None:
    ranks, welcomes = met([line.Hello(0, 40, 8, True), other])
    assert not ranks.elastic
    assert [each.chunk_blocks for each in welcomes] == [0, 0]


def test_a_rank_that_fails_before_it_has_met_the_others_is_not_waited_for() -> None:
    with pytest.raises(EOFError, match="has ended"):
        met([None, line.Hello(1, 40, 8, True)])
