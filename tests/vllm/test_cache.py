"""The memory under an engine's blocks: chunks come and go in all regions and layers at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

import torch

import torch_elastic_mem as tem
from torch_elastic_mem import _C
from torch_elastic_mem.elastic_kv import ElasticKVTensor
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.compat import Region, Unsupported

KiB = 1 << 10
MiB = 1 << 20
GRANULE = 2 * MiB


def region(blocks: int, block_bytes: int, layers: int = 1) -> Region:
    return Region(blocks * block_bytes * layers, block_bytes, layers)


def cache_of(blocks: int, *regions: Region, capacity: int = 512 * MiB) -> ElasticCache:
    arena = tem.Arena("host", capacity=capacity, reserve=(0, 0), broker=None)
    assert arena.granularity == GRANULE
    return ElasticCache(arena.account("engine", "serving"), blocks, regions)


def residents(cache: ElasticCache, layer: int = 0) -> set[int]:
    """Blocks with memory, in one layer."""
    ((part, _),) = cache._parts
    first = layer * cache.num_blocks
    return {block for block in range(cache.num_blocks) if part.is_resident(first + block)}


def allocated(cache: ElasticCache, *sizes: int) -> list[torch.Tensor]:
    """What vLLM gets where it allocates its cache."""
    with cache.handed_out():
        return [torch.zeros(size, dtype=torch.int8) for size in sizes]


def test_a_chunk_is_the_neighbours_that_share_extents() -> None:
    cache = cache_of(32, region(32, 1 * MiB))
    assert (cache.chunk_blocks, cache.num_chunks, cache.chunk_bytes) == (2, 16, GRANULE)
    assert cache.freed_bytes == GRANULE
    assert cache.resident_bytes == 0


def test_blocks_larger_than_an_extent_are_chunks_of_their_own() -> None:
    cache = cache_of(8, region(8, 4 * MiB))
    assert (cache.chunk_blocks, cache.num_chunks) == (1, 8)
    cache.ensure([3])
    assert residents(cache) == {3}
    assert cache.resident_bytes == 4 * MiB


def test_the_last_chunk_may_be_shorter() -> None:
    cache = cache_of(7, region(7, 1 * MiB))
    assert cache.num_chunks == 4
    assert cache.blocks([0, 3]) == [0, 1, 6]
    cache.ensure([3])
    assert residents(cache) >= {6} and not residents(cache) & set(range(6))
    cache.release([3])
    assert cache.resident_bytes == 0


def test_a_chunk_has_memory_in_all_layers_or_none() -> None:
    cache = cache_of(40, region(40, 1 * MiB, layers=3))
    assert cache.chunk_bytes == 3 * GRANULE
    cache.ensure([1, 4])
    assert cache.resident_bytes == cache.account.held == 2 * cache.chunk_bytes
    assert [residents(cache, layer) for layer in range(3)] == [{2, 3, 8, 9}] * 3
    cache.release([1])
    assert cache.resident_bytes == cache.account.held == cache.chunk_bytes
    assert [residents(cache, layer) for layer in range(3)] == [{8, 9}] * 3
    cache.release([4])
    assert cache.resident_bytes == cache.account.held == 0


def test_what_stays_keeps_its_bytes_in_all_layers() -> None:
    cache = cache_of(40, region(40, 1 * MiB, layers=3))
    (memory,) = allocated(cache, 120 * MiB)
    blocks = memory.view(3, 40, MiB)
    cache.ensure([0, 1, 2])
    for layer in range(3):
        for block in range(6):
            blocks[layer, block].fill_(10 * layer + block)
    cache.release([1])
    for layer in range(3):
        for block in (0, 1, 4, 5):
            assert bool((blocks[layer, block] == 10 * layer + block).all())


def test_layers_that_do_not_begin_at_an_extent_are_kept_apart_by_smaller_ones() -> None:
    cache = cache_of(41, region(41, 1 * MiB, layers=3))
    cache.ensure(range(cache.num_chunks))
    before = cache.account.held
    cache.release([2])
    assert before - cache.account.held >= cache.freed_bytes > 0
    for layer in range(3):
        assert residents(cache, layer) >= set(range(41)) - set(cache.blocks([2]))


@pytest.mark.parametrize("block_bytes", [GRANULE, MiB, 3 * MiB, MiB + MiB // 2, 5 * MiB + 4 * KiB])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_chunk_beside_neighbours_that_stay_frees_what_is_promised(block_bytes: int, layers: int) -> None:
    cache = cache_of(24, region(24, block_bytes, layers))
    cache.ensure(range(cache.num_chunks))
    for chunk in (1, cache.num_chunks // 2):
        before = cache.account.held
        cache.release([chunk])
        assert before - cache.account.held >= cache.freed_bytes
        cache.ensure([chunk])


@pytest.mark.parametrize(("block_bytes", "layers"), [(700 * KiB, 1), (700 * KiB, 3), (GRANULE + 4 * KiB, 1)])
def test_a_chunk_hardly_larger_than_an_extent_frees_what_is_promised(block_bytes: int, layers: int) -> None:
    cache = cache_of(64, region(64, block_bytes, layers))
    cache.ensure(range(cache.num_chunks))
    before = cache.account.held
    cache.release([cache.num_chunks // 2])
    assert before - cache.account.held >= cache.freed_bytes


@pytest.mark.parametrize(("blocks", "block_bytes"), [(31, MiB), (49, 700 * KiB), (50, 3 * MiB + 4 * KiB)])
def test_of_a_short_last_chunk_nothing_is_promised(blocks: int, block_bytes: int) -> None:
    cache = cache_of(blocks, region(blocks, block_bytes))
    last = cache.num_chunks - 1
    short = blocks % cache.chunk_blocks != 0
    cache.ensure(range(cache.num_chunks))
    for chunks in ([last], [last, 1], [1, 2]):
        promised = cache.freed_bytes * (len(chunks) - (short and last in chunks))
        expected, before = cache.freed(chunks), cache.account.held
        cache.release(chunks)
        assert before - cache.account.held >= expected >= promised
        cache.ensure(chunks)


def test_regions_of_one_shape_and_of_several_come_and_go_together() -> None:
    shapes = [region(32, 1 * MiB), region(32, 2 * MiB), region(32, 1 * MiB)]
    cache = cache_of(32, *shapes)
    assert (cache.block_bytes, cache.chunk_blocks) == (4 * MiB, 2)
    cache.ensure([2])
    assert cache.resident_bytes == cache.chunk_bytes == 8 * MiB
    first, second, third = allocated(cache, *(shape.bytes for shape in shapes))
    for tensor, size in ((first, MiB), (second, 2 * MiB), (third, MiB)):
        tensor.view(32, size)[4:6].fill_(7)
    assert len({tensor.data_ptr() for tensor in (first, second, third)}) == 3
    cache.release([2])
    assert cache.resident_bytes == 0


def test_memory_comes_to_all_regions_or_to_none() -> None:
    cache = cache_of(32, region(32, 1 * MiB), region(32, 2 * MiB), capacity=8 * MiB)
    cache.ensure([1])
    before = cache.resident_bytes
    assert before == cache.chunk_bytes == 6 * MiB
    with pytest.raises(tem.OutOfMemory):
        cache.ensure([4])
    assert cache.resident_bytes == cache.account.held == before
    assert cache.account.room() == 2 * MiB
    cache.release([1])
    cache.ensure([4])


def test_a_small_cache_still_comes_in_many_pieces_and_a_large_one_in_larger() -> None:
    assert cache_of(64, region(64, 2 * MiB)).num_chunks == 64
    large = cache_of(4096, region(4096, 1 * MiB))
    assert (large.chunk_bytes, large.num_chunks) == (16 * MiB, 256)


def test_vllms_allocations_are_answered_once_by_their_size_and_others_are_left_alone() -> None:
    cache = cache_of(32, region(32, 1 * MiB), region(32, 2 * MiB))
    with cache.handed_out():
        others = [
            torch.zeros(16, dtype=torch.int8),
            torch.zeros(32 * KiB, dtype=torch.float32),
            torch.zeros((32, 2), dtype=torch.int8),
        ]
        wide = torch.zeros(64 * MiB, dtype=torch.int8)
        narrow = torch.zeros(32 * MiB, dtype=torch.int8, device="cpu")
        again = torch.zeros(32 * MiB, dtype=torch.int8)
    cache.ensure([0])
    for tensor in (wide, narrow):
        tensor[0].fill_(3)
    assert [tensor.numel() for tensor in (wide, narrow)] == [64 * MiB, 32 * MiB]
    assert int(again[0]) == 0 and again.data_ptr() != narrow.data_ptr()
    assert all(not bool(other.any()) for other in others)


def test_what_vllm_does_not_allocate_as_expected_is_not_served() -> None:
    cache = cache_of(32, region(32, 1 * MiB), region(32, 1 * MiB))
    with pytest.raises(Unsupported, match="did not allocate 1 of its KV cache's regions"):
        allocated(cache, 32 * MiB)


def test_more_neighbours_may_come_and_go_together_than_share_extents() -> None:
    cache = cache_of(32, region(32, 1 * MiB))
    cache.set_chunks(6)
    assert (cache.chunk_blocks, cache.num_chunks, cache.chunk_bytes) == (6, 6, 6 * MiB)
    assert cache.freed_bytes == 3 * GRANULE
    cache.ensure([1, 5])
    assert residents(cache) == {*range(6, 12), 30, 31}


@pytest.mark.parametrize("chunks", [[0], [2], [1, 2], [0, 3, 4]])
@pytest.mark.parametrize(
    "regions",
    [
        [region(40, 1 * MiB)],
        [region(40, 300 * KiB)],
        [region(40, 300 * KiB, layers=3)],
        [region(40, 1 * MiB), region(40, 1 * MiB), region(40, 512 * KiB)],
    ],
)
def test_what_memory_under_chunks_takes_is_known_before(regions: list[Region], chunks: list[int]) -> None:
    cache = cache_of(40, *regions)
    chunks = [chunk for chunk in chunks if chunk < cache.num_chunks]
    wanted = cache.bytes_under(chunks)
    cache.ensure(chunks)
    assert cache.resident_bytes == cache.account.held == wanted


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A stream of the host backend whose work has not ended, and on which caches let go."""
    stream = _C.host_stream_create()
    _C.host_stream_submit(stream)
    monkeypatch.setattr(ElasticKVTensor, "stream", lambda _: stream)
    yield stream
    _C.host_stream_complete(stream)
    _C.host_stream_destroy(stream)


def test_what_was_let_go_goes_to_whoever_asked_for_it_and_is_not_held_again_meanwhile(stuck: int) -> None:
    arena = tem.Arena("host", capacity=32 * MiB, reserve=(0, 0), broker=None)
    cache = ElasticCache(arena.account("engine", "serving"), 32, [region(32, 1 * MiB)])
    cache.ensure(range(16))
    given, refused = threading.Event(), threading.Event()

    def give(nbytes: int, timeout: float) -> None:
        cache.release([4, 5])
        given.set()

    def grow() -> None:
        with pytest.raises(tem.OutOfMemory):
            cache.ensure([4, 5], timeout=60.0)
        refused.set()

    cache.account.on_reclaim(give, "evict")
    pressing = arena.account("pressing", tem.PriorityClass("pressing", 10**6)).range("8MiB")
    threads = [threading.Thread(target=pressing.grow, args=(2 * GRANULE,), kwargs={"timeout": 60.0})]
    threads.append(threading.Thread(target=grow))
    threads[0].start()
    assert given.wait(60)
    threads[1].start()
    assert not refused.wait(0.05), "the steps before have not ended"
    _C.host_stream_complete(stuck)
    for each in threads:
        each.join(60)
    assert refused.is_set() and pressing.mapped == 2 * GRANULE


def test_what_steps_hold_on_to_for_too_long_is_refused_in_words(stuck: int) -> None:
    cache = cache_of(32, region(32, 1 * MiB))
    cache.ensure([3])
    cache.release([3])
    with pytest.raises(tem.OutOfMemory, match=r"chunk 3 .* has been given up"):
        cache.ensure([3], timeout=0.01)
    assert cache.going() == [3]
    _C.host_stream_complete(stuck)
    cache.ensure([3])
    assert residents(cache) == {6, 7}
    assert cache.going() == []


def test_a_short_chunk_at_the_end_is_not_waited_for(stuck: int) -> None:
    cache = cache_of(33, region(33, 1 * MiB))
    cache.ensure([16])
    cache.release([16])
    cache.ensure([16], timeout=0.01)
