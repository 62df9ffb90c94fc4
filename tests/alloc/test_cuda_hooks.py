"""The plain C hooks for torch's pluggable CUDA allocator, called as torch calls them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest

import torch_elastic_mem as tem
from tests.rungs import FakeRung, MiB
from torch_elastic_mem import _C

pytestmark = pytest.mark.rungs("fake")
G = 2 * MiB

hooks = ctypes.CDLL(_C.__file__)
hooks.tem_cuda_alloc.restype = ctypes.c_void_p
hooks.tem_cuda_alloc.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
hooks.tem_cuda_free.restype = None
hooks.tem_cuda_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
hooks.tem_cuda_record_stream.restype = None
hooks.tem_cuda_record_stream.argtypes = [ctypes.c_void_p, ctypes.c_void_p]


@pytest.fixture
def arena(rung: FakeRung) -> Iterator[tem.Arena]:
    with rung.arena(32 * G) as made:
        yield made


@pytest.fixture
def account(arena: tem.Arena) -> Iterator[tem.Account]:
    with arena.account("training") as made:
        _C.set_device_default(0, made.allocator())
        yield made
        _C.set_device_default(0, None)


def live(account: tem.Account) -> int:
    return account.allocator().live_bytes


def test_outside_of_a_scope_the_devices_default_is_charged(account: tem.Account, rung: FakeRung) -> None:
    block = hooks.tem_cuda_alloc(3 * MiB, 0, None)
    assert live(account) == 3 * MiB
    rung.write(block, b"x" * 100)
    assert rung.read(block, 100) == b"x" * 100
    hooks.tem_cuda_free(block, 3 * MiB, 0, None)
    assert live(account) == 0


def test_within_a_scope_its_account_is_charged_and_any_thread_frees(
    arena: tem.Arena, account: tem.Account
) -> None:
    with arena.account("other") as other:
        with other.allocations():
            block = hooks.tem_cuda_alloc(MiB, 0, None)
        assert (live(account), live(other)) == (0, MiB)
        thread = threading.Thread(target=hooks.tem_cuda_free, args=(block, MiB, 0, None))
        thread.start()
        thread.join()
        assert live(other) == 0


def test_devices_have_defaults_of_their_own(account: tem.Account, rung: FakeRung) -> None:
    with rung.arena(8 * G, device="cuda:1") as arena, arena.account("second") as second:
        _C.set_device_default(1, second.allocator())
        block = hooks.tem_cuda_alloc(MiB, 1, None)
        with second.allocations():  # serves its own device alone
            first = hooks.tem_cuda_alloc(MiB, 0, None)
        assert (live(account), live(second)) == (MiB, MiB)
        hooks.tem_cuda_free(block, MiB, 1, None)
        hooks.tem_cuda_free(first, MiB, 0, None)
        _C.set_device_default(1, None)


def test_zero_bytes_are_null_and_null_is_freed_in_silence(
    account: tem.Account, capfd: pytest.CaptureFixture[str]
) -> None:
    assert hooks.tem_cuda_alloc(0, 0, None) is None
    hooks.tem_cuda_free(None, 0, 0, None)
    hooks.tem_cuda_record_stream(None, None)
    assert live(account) == 0
    assert capfd.readouterr().err == ""


def test_a_pointer_of_nobody_is_told_and_harms_nothing(
    account: tem.Account, capfd: pytest.CaptureFixture[str]
) -> None:
    block = hooks.tem_cuda_alloc(MiB, 0, None)
    hooks.tem_cuda_free(block, MiB, 0, None)
    hooks.tem_cuda_free(block, MiB, 0, None)
    hooks.tem_cuda_free(0x1234, MiB, 0, None)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert f"torch_elastic_mem: free: the blocks of training: free of {block:#x}" in said[0]
    assert "torch_elastic_mem: free: 0x1234 is not from any account" in said[1]
    hooks.tem_cuda_record_stream(0x1234, None)
    assert live(account) == 0


def test_a_recorded_stream_keeps_the_block_from_others_until_it_passed(
    account: tem.Account, rung: FakeRung
) -> None:
    side = rung.stream()
    block = hooks.tem_cuda_alloc(G, 0, None)
    hooks.tem_cuda_record_stream(block, side.handle)
    side.submit()
    hooks.tem_cuda_free(block, G, 0, None)
    other = hooks.tem_cuda_alloc(G, 0, None)
    assert other != block
    side.complete()
    again = hooks.tem_cuda_alloc(G, 0, None)
    assert again == block
    for one in (again, other):
        hooks.tem_cuda_free(one, G, 0, None)


def test_blocks_of_a_stream_are_that_streams(account: tem.Account, rung: FakeRung) -> None:
    mine, other = rung.stream(), rung.stream()
    block = hooks.tem_cuda_alloc(G, 0, mine.handle)
    hooks.tem_cuda_free(block, G, 0, mine.handle)
    elsewhere = hooks.tem_cuda_alloc(G, 0, other.handle)
    assert elsewhere != block
    assert hooks.tem_cuda_alloc(G, 0, mine.handle) == block
    for one in (block, elsewhere):
        hooks.tem_cuda_free(one, G, 0, mine.handle)


def test_the_torch_object_is_for_the_accounts_own_device(account: tem.Account) -> None:
    import torch

    for device in ("cuda:1", "cpu", "host", "cuda:x"):
        with pytest.raises(tem.InvalidArgument, match="the account 'training' is on cuda:0"):
            tem.torch_allocator(device, account)
    if torch.version.cuda is None:
        with pytest.raises(tem.DriverMissing, match="built without CUDA"):
            tem.torch_allocator("cuda", account)
