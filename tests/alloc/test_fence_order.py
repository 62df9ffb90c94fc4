"""An extent waits for the last free of a block on it, whatever it has joined since."""

from __future__ import annotations

import pytest

from tests.rungs import HostRung
from torch_elastic_mem import _C

MiB = 1 << 20
BLOCK = 4 * MiB


@pytest.mark.rungs("host")
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_each_extent_of_a_joined_span_waits_for_its_own_free(rung: HostRung, order: tuple[int, ...]) -> None:
    account = rung.arena("64MiB").account("a")
    allocator = account.allocator()
    stream = rung.stream()
    blocks = [allocator.allocate(BLOCK, stream.handle) for _ in range(3)]
    assert blocks == [blocks[0] + i * BLOCK for i in range(3)], "neighbours, so that they join"
    for i in order:
        stream.submit()
        allocator.free(blocks[i])
    for freed in range(1, 4):
        assert account.trim() == 0, f"{4 - freed} pieces of work that may touch the span are pending"
        _C.host_stream_complete(stream.handle, 1)
        assert account.trim() == BLOCK
        assert account.held == (3 - freed) * BLOCK


@pytest.mark.rungs("host")
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_an_extent_waits_for_the_latest_free_of_the_blocks_it_holds(
    rung: HostRung, order: tuple[int, ...]
) -> None:
    account = rung.arena("64MiB").account("a")
    allocator = account.allocator()
    stream = rung.stream()
    blocks = [allocator.allocate(MiB // 2, stream.handle) for _ in range(4)]
    for i in order:
        stream.submit()
        allocator.free(blocks[i])
    for _ in range(4):
        assert account.trim() == 0
        _C.host_stream_complete(stream.handle, 1)
    assert account.trim() == 2 * MiB
