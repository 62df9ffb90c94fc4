"""A free span waits for the last of the frees that made it, in whatever order they joined."""

from __future__ import annotations

import pytest

from tests.rungs import HostRung
from torch_elastic_mem import _C

MiB = 1 << 20
BLOCK = 4 * MiB


@pytest.mark.rungs("host")
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_joined_frees_wait_for_the_latest_of_them(rung: HostRung, order: tuple[int, ...]) -> None:
    account = rung.arena("64MiB").account("a")
    allocator = account.allocator()
    stream = rung.stream()
    blocks = [allocator.allocate(BLOCK, stream.handle) for _ in range(3)]
    assert blocks == [blocks[0] + i * BLOCK for i in range(3)], "neighbours, so that they join"
    for i in order:
        stream.submit()
        allocator.free(blocks[i])
    for left in (2, 1):
        _C.host_stream_complete(stream.handle, 1)
        assert account.trim() == 0, f"{left} pieces of work that may touch the span are pending"
    stream.complete()
    assert account.trim() == account.allocator().live_bytes + 3 * BLOCK
    assert account.held == 0
