"""The balloon over vLLM's own pool: what is parked is out of it, and what is cheap goes first."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.vllm.pools import cached, fill, free_ids, hash_of, leave, pool_of, take, unhashed_first
from torch_elastic_mem.integrations.vllm.balloon import Balloon, Counts
from torch_elastic_mem.integrations.vllm.compaction import Chunk


def blocks_of(balloon: Balloon, chunks: list[int]) -> set[int]:
    return {block.block_id for chunk in chunks for block in balloon.of(chunk)}


def test_the_pool_hands_out_blocks_of_resident_chunks_only() -> None:
    pool = pool_of(32)
    balloon = Balloon(pool, 4, resident=3)
    assert balloon.parked == 5
    assert {block.block_id for block in pool.get_new_blocks(11)} == set(range(1, 12))
    with pytest.raises(ValueError):
        pool.get_new_blocks(1)


def test_every_block_but_the_null_block_is_in_one_state() -> None:
    pool = pool_of(32)
    balloon = Balloon(pool, 4, resident=5)
    assert balloon.counts() == Counts(in_use=0, cached=0, free=19, parked=12)
    leave(pool, [4, 5, 6])
    held = take(pool, [6, 9])
    assert balloon.counts() == Counts(in_use=2, cached=2, free=15, parked=12)
    pool.free_blocks(held)
    balloon.park([1])
    assert balloon.counts() == Counts(in_use=0, cached=0, free=15, parked=16)


def test_of_a_prefix_those_blocks_count_that_somebody_holds_up_to_the_first_that_nobody_does() -> None:
    pool = pool_of(32)
    balloon = Balloon(pool, 4, resident=8)
    leave(pool, [4, 5, 6, 7, 8])
    hashes = [hash_of(content) for content in (4, 5, 6, 7, 9)]
    assert balloon.held_prefix(hashes) == 0
    take(pool, [4, 5, 7])
    assert balloon.held_prefix(hashes) == 2
    take(pool, [6])
    assert balloon.held_prefix(hashes) == 4
    assert balloon.held_prefix([]) == 0


def test_the_chunk_of_the_null_block_is_neither_parked_nor_offered() -> None:
    pool = pool_of(8)
    balloon = Balloon(pool, 4, resident=0)
    assert (balloon.parked, free_ids(pool)) == (1, [1, 2, 3])
    balloon.unpark([1])
    assert balloon.cheapest(9) == [1]
    assert balloon.next_out(9) == []


def test_a_pool_of_one_chunk_has_nothing_to_park() -> None:
    pool = pool_of(3)
    balloon = Balloon(pool, 4, resident=1)
    assert (balloon.num_chunks, balloon.parked, balloon.cheapest(4)) == (1, 0, [])
    assert pool.get_num_free_blocks() == 2


def test_parking_and_unparking_leaves_the_counts_right() -> None:
    pool = pool_of(32)
    balloon = Balloon(pool, 4, resident=8)
    assert (pool.get_num_free_blocks(), balloon.in_use()) == (31, 0)
    held = pool.get_new_blocks(5)
    for _ in range(3):
        balloon.park([4, 6, 7])
        assert (pool.get_num_free_blocks(), balloon.parked_blocks, balloon.in_use()) == (14, 12, 5)
        balloon.unpark([7, 4])
        assert (pool.get_num_free_blocks(), balloon.parked_blocks, balloon.in_use()) == (22, 4, 5)
        balloon.unpark([6])
        assert (pool.get_num_free_blocks(), balloon.parked_blocks, balloon.in_use()) == (26, 0, 5)
    pool.free_blocks(held)
    assert sorted(free_ids(pool)) == list(range(1, 32))
    assert all(block.ref_cnt == 0 for block in pool.blocks)


def test_the_last_chunk_may_be_shorter() -> None:
    pool = pool_of(10)
    balloon = Balloon(pool, 4, resident=1)
    assert (balloon.num_chunks, balloon.parked_blocks) == (3, 6)
    assert blocks_of(balloon, [2]) == {8, 9}
    balloon.unpark([2])
    assert (balloon.parked_blocks, sorted(free_ids(pool))) == (4, [1, 2, 3, 8, 9])
    assert balloon.cheapest(1) == [2]
    balloon.park([2])
    assert (balloon.parked_blocks, pool.get_num_free_blocks(), balloon.in_use()) == (6, 3, 0)


def test_the_lowest_parked_chunks_come_back_first_and_their_lowest_blocks_are_used_first() -> None:
    pool = pool_of(32)
    balloon = Balloon(pool, 4, resident=1)
    assert balloon.next_out(3) == [1, 2, 3]
    assert balloon.next_out(3, without=[2, 1]) == [3, 4, 5]
    held = pool.get_new_blocks(3)
    balloon.unpark([3, 1, 2])
    assert free_ids(pool) == list(range(4, 16))
    assert len(held) == 3


def test_a_chunk_with_a_block_in_use_is_never_offered() -> None:
    pool = pool_of(20)
    balloon = Balloon(pool, 4, resident=5)
    held = take(pool, [6, 13])
    assert balloon.cheapest(9) == [4, 2]
    pool.free_blocks(held[:1])
    assert balloon.cheapest(9) == [4, 2, 1]


def test_a_chunk_that_is_read_yet_is_not_offered_though_nobody_holds_it() -> None:
    pool = pool_of(32)
    read: set[int] = {9, 13}
    balloon = Balloon(pool, 4, 8, lambda: read)
    take(pool, [12])
    assert 2 not in balloon.cheapest(8) and 3 not in balloon.cheapest(8)
    assert balloon.coming() == 1, "of one of the two somebody holds a block"
    read.add(0)
    assert balloon.coming() == 1, "the null block's chunk is not to be had"
    read.clear()
    assert 2 in balloon.cheapest(8) and balloon.coming() == 0


def test_a_block_that_left_the_queue_without_a_count_is_in_use() -> None:
    pool = pool_of(12)
    balloon = Balloon(pool, 4, resident=3)
    pool.get_new_blocks(3)
    (sink,) = pool.free_block_queue.popleft_n(1)
    assert (sink.block_id, sink.ref_cnt) == (4, 0)
    assert balloon.cheapest(9) == [2]


def test_a_cached_block_that_a_request_has_hit_is_in_use() -> None:
    pool = pool_of(12)
    balloon = Balloon(pool, 4, resident=3)
    leave(pool, [4])
    pool.touch([pool.blocks[4]])
    assert balloon.cheapest(9) == [2]


def test_the_cheapest_have_the_fewest_cached_blocks_then_the_coldest_then_the_highest() -> None:
    pool = pool_of(24)
    balloon = Balloon(pool, 4, resident=6)
    leave(pool, [8, 9])  # chunk 2: two blocks, the coldest of all
    leave(pool, [12])  # chunk 3
    leave(pool, [4])  # chunk 1: as many as in chunk 3, used later
    assert balloon.cheapest(9) == [5, 4, 3, 1, 2]
    assert balloon.cheapest(2) == [5, 4]
    assert balloon.cheapest(0) == []


def test_how_lately_a_chunk_was_used_is_how_lately_any_of_its_blocks_was() -> None:
    pool = pool_of(12)
    balloon = Balloon(pool, 4, resident=3)
    leave(pool, [4, 8, 9, 5])
    assert balloon.cheapest(9) == [2, 1]
    pool.touch([pool.blocks[8]])
    pool.free_blocks([pool.blocks[8]])
    assert balloon.cheapest(9) == [1, 2]


def test_parked_chunks_are_not_offered() -> None:
    pool = pool_of(24)
    balloon = Balloon(pool, 4, resident=6)
    balloon.park([5, 3])
    assert balloon.cheapest(9) == [4, 2, 1]


def test_parking_a_chunk_forgets_what_is_cached_in_it_and_nothing_else() -> None:
    pool = pool_of(16)
    balloon = Balloon(pool, 4, resident=4)
    leave(pool, [4, 5, 8])
    balloon.park([1])
    assert [cached(pool, content) for content in (4, 5, 8)] == [False, False, True]
    balloon.unpark([1])
    assert all(block.block_hash is None for block in balloon.of(1))
    assert not cached(pool, 4)


def test_every_name_of_a_cached_block_is_forgotten_when_it_is_parked() -> None:
    pool = pool_of(8)
    balloon = Balloon(pool, 4, resident=2)
    (block,) = take(pool, [5])
    fill(pool, block, 1)
    fill(pool, block, 2)
    pool.free_blocks([block])
    assert cached(pool, 1) and cached(pool, 2)
    balloon.park([1])
    assert not cached(pool, 1) and not cached(pool, 2)


def test_unused_blocks_are_free_and_hold_nothing() -> None:
    pool = pool_of(33)
    balloon = Balloon(pool, 4, resident=9)
    assert balloon.unused(100) == 32
    leave(pool, [30, 31])
    assert balloon.unused(100) == 30
    held = pool.get_new_blocks(6)
    assert balloon.unused(100) == 24
    pool.free_blocks(held)
    assert balloon.unused(100) == 30
    balloon.park([2])
    assert balloon.unused(100) == 26
    balloon.unpark([2])
    assert balloon.unused(100) == 30


def test_unused_blocks_that_were_handed_out_are_not_counted() -> None:
    pool = pool_of(33)
    balloon = Balloon(pool, 4, resident=9)
    assert 8 <= balloon.unused(8) <= 32
    for _ in range(31):
        pool.get_new_blocks(1)
        left = unhashed_first(pool)
        assert balloon.unused(8) <= left
        assert balloon.unused(8) >= min(8, left)


def test_parked_blocks_are_not_counted_as_unused() -> None:
    pool = pool_of(33)
    balloon = Balloon(pool, 4, resident=9)
    assert balloon.unused(8) >= 8
    balloon.park(range(2, 9))
    assert balloon.unused(8) == 7


def test_blocks_are_counted_anew_only_when_some_may_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    count = Balloon._count
    monkeypatch.setattr(Balloon, "_count", lambda self, most: counted.append(most) or count(self, most))
    pool = pool_of(32)
    balloon = Balloon(pool, 4, resident=4)
    assert [balloon.unused(20) for _ in range(3)] == [15] * 3
    taken = pool.get_new_blocks(5)
    assert [balloon.unused(20) for _ in range(3)] == [10] * 3
    assert len(counted) == 1
    pool.free_blocks(taken[:2])
    assert [balloon.unused(20) for _ in range(3)] == [12] * 3
    balloon.unpark(balloon.next_out(1))
    assert [balloon.unused(20) for _ in range(3)] == [16] * 3
    balloon.park([4])
    balloon.unpark([4])
    assert len(counted) == 3
    # No more than so many were counted: there may be more for who wants more.
    assert (balloon.unused(2), balloon.unused(20)) == (8, 16)


def test_when_only_cached_blocks_are_left_none_is_unused() -> None:
    pool = pool_of(8)
    balloon = Balloon(pool, 4, resident=2)
    leave(pool, range(1, 8))
    assert balloon.unused(4) == 0
    pool.get_new_blocks(2)
    assert balloon.unused(4) == 0
    assert balloon.unused(0) <= 0


def test_blocks_that_vllm_has_for_itself_keep_their_chunks() -> None:
    pool = pool_of(16)
    (sink,) = pool.free_block_queue.popleft_n(4)[3:]
    balloon = Balloon(pool, 4, resident=4)
    assert sink.block_id == 4
    take(pool, [9, 11])
    assert [balloon.held(chunk) for chunk in range(4)] == [None, None, [9, 11], []]


def test_a_plan_is_told_how_full_chunks_are_and_of_holes_the_empty_and_the_coldest() -> None:
    pool = pool_of(16)
    balloon = Balloon(pool, 4, resident=3)
    leave(pool, [9, 5, 6])
    take(pool, [4, 8])
    assert balloon.occupancy() == [Chunk(0, 1, 3, 0), Chunk(1, 1, 3, 2), Chunk(2, 1, 3, 1)]
    empty = {1, 2, 3, 7, 10, 11}
    assert {hole.block for hole in balloon.holes([], 0)} == empty
    for cold in range(4):
        found = sorted(balloon.holes([], cold))
        assert {hole.block for hole in found[:6]} == empty
        assert all(hole.warmth < 0 for hole in found[:6])
        assert [hole.block for hole in found[6:]] == [9, 5, 6][:cold]
    assert all(hole.chunk == hole.block // 4 for hole in balloon.holes([], 3))
    # Those that go give no place: the coldest is the coldest of the others.
    assert {hole.block for hole in balloon.holes([2], 1)} == {1, 2, 3, 7, 5}
