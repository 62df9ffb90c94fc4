"""Memory that reaches other devices than its own."""

from __future__ import annotations

import pytest

import torch_elastic_mem as tem
from tests.alloc.sharing import Peer
from tests.rungs import FakeRung, MiB
from torch_elastic_mem import _C

pytestmark = pytest.mark.rungs("fake")
G = 2 * MiB


def test_memory_of_a_device_that_is_another_here_is_refused(rung: FakeRung) -> None:
    peer = Peer(rung)
    arena = rung.arena(8 * G, device="cuda:1")
    account = arena.account("second")
    heap = _C.Allocator(account._core, "second")
    address = heap.allocate(G, 0)
    handle, _ = heap.share(address)
    with pytest.raises(tem.InvalidArgument, match=r"device 0 here is GPU-.*CUDA_VISIBLE_DEVICES"):
        peer.ask("open", handle.hex())
    heap.free(address)
    heap.close()
    account.close()
    peer.end()
