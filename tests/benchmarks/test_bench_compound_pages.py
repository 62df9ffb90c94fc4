import pytest

import torch_elastic_mem as tem
from benchmarks.caches import CompoundPages

MIB = 1 << 20
# Llama-3.1-8B: 2 MiB blocks over 32 layers, so 64 of them share 128 MiB of compound pages.
COMPOUND = 128 * MIB


def test_a_page_comes_with_its_first_block_and_goes_with_its_last():
    cache = CompoundPages(4 * COMPOUND, 2 * MIB, 32)
    first = cache.allocate(64)
    assert cache.mapped_bytes == COMPOUND == cache.live_bytes
    second = cache.allocate(1)
    assert cache.mapped_bytes == 2 * COMPOUND
    cache.free(first[1:])
    assert (cache.live_bytes, cache.mapped_bytes) == (4 * MIB, 2 * COMPOUND)
    cache.free(first[:1])
    assert cache.mapped_bytes == COMPOUND
    cache.free(second)
    assert (cache.live_bytes, cache.mapped_bytes) == (0, 0)


def test_blocks_are_placed_lowest_first():
    cache = CompoundPages(COMPOUND, 2 * MIB, 32)
    blocks = cache.allocate(10)
    cache.free([blocks[7], blocks[3]])
    assert cache.allocate(3) == [3, 7, 10]


def test_a_refusal_takes_nothing():
    cache = CompoundPages(COMPOUND, 2 * MIB, 32)
    with pytest.raises(tem.OutOfMemory, match="65 blocks asked, 64 free"):
        cache.allocate(65)
    assert cache.mapped_bytes == 0
    assert len(cache.allocate(64)) == 64
