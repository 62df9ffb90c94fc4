"""Memory that reaches other devices than its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

import torch_elastic_mem as tem
import torch_elastic_mem.arena
from tests.alloc.sharing import ROOT, Home, Peer
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


def reaches(rung: FakeRung, address: int, device: int) -> bool:
    flags, location = ctypes.c_ulonglong(), (ctypes.c_int * 2)(1, device)
    assert rung.driver.cuMemGetAccess(ctypes.byref(flags), location, ctypes.c_ulonglong(address)) == 0
    return flags.value == 3


def test_a_peer_reaches_what_is_mapped_and_what_will_be_of_every_account(rung: FakeRung) -> None:
    home = Home(rung)
    cache = home.account.range(8 * G)
    cache.grow(2 * G)
    other = home.arena.account("other")
    theirs = _C.Allocator(other._core, "other")
    blocks = [(home.heap, home.heap.allocate(G, 0)) for _ in range(3)]
    home.heap.free(blocks.pop(1)[1])
    home.account.trim()
    blocks.append((theirs, theirs.allocate(G, 0)))
    handle, _ = home.heap.share(blocks[0][1])
    opened = home.heap.open_shared(handle)
    assert not any(reaches(rung, address, 1) for _, address in blocks)
    home.heap.allow_peer(1)
    blocks.append((theirs, theirs.allocate(3 * G, 0)))
    blocks.append((home.heap, home.heap.allocate(G, 0)))
    for address in [opened.address, cache.address + G, *(address for _, address in blocks)]:
        assert reaches(rung, address, 1) and reaches(rung, address, 0)
    calls = rung.driver.fake_cuda_count(b"cuMemSetAccess")
    home.heap.allow_peer(1)
    assert rung.driver.fake_cuda_count(b"cuMemSetAccess") == calls, "it is asked once"
    for heap, address in blocks:
        heap.free(address)
    opened.close()
    cache.close()
    for heap, account in ((home.heap, home.account), (theirs, other)):
        heap.close()
        account.close()


def test_a_refused_peer_is_told_and_asked_again(rung: FakeRung, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(rung)
    address = home.heap.allocate(G, 0)
    with pytest.raises(tem.DriverError, match="access by cuda:7 to memory on cuda:0"):
        home.heap.allow_peer(7)
    with monkeypatch.context() as lonely:
        lonely.setenv("FAKE_CUDA_NO_PEERS", "1")
        with pytest.raises(tem.DriverError, match="by cuda:1 to memory on cuda:0: the two are no peers"):
            home.heap.allow_peer(1)
    rung.fail_nth(1)
    with pytest.raises(tem.DriverError, match="cuMemSetAccess"):
        home.heap.allow_peer(1)
    assert not reaches(rung, address, 1)
    home.heap.allow_peer(1)
    assert reaches(rung, address, 1)
    home.heap.free(address)
    home.heap.close()
    home.account.close()


def test_what_comes_to_serve_a_device_later_is_told_of_its_peers(rung: FakeRung) -> None:
    # Of a process of its own: that two devices are peers is never forgotten.
    program = f"""
import ctypes, torch_elastic_mem as tem, torch_elastic_mem.arena
from torch_elastic_mem import _C
torch_elastic_mem.arena.LIBCUDA = {torch_elastic_mem.arena.LIBCUDA!r}
driver = ctypes.CDLL(torch_elastic_mem.arena.LIBCUDA)
flags = ctypes.c_ulonglong()
def reaches(block):
    location = (ctypes.c_int * 2)(1, 1)
    assert driver.cuMemGetAccess(ctypes.byref(flags), location, ctypes.c_ulonglong(block)) == 0
    return flags.value == 3
for way in ("nobody yet", "an account's scope", "the device's default"):
    arena = tem.Arena("cuda", capacity=1 << 24, reserve=(0, 0))
    account = arena.account("a")
    block = account.allocator().allocate(1 << 21, 0)
    assert not reaches(block)
    if way == "nobody yet":
        _C.allow_peer(0, 1)
    elif way == "an account's scope":
        with account.allocations():
            assert reaches(block)
    else:
        _C.set_device_default(0, account.allocator())
        assert reaches(block)
        _C.set_device_default(0, None)
    account.allocator().free(block)
    account.close()
    arena.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)
