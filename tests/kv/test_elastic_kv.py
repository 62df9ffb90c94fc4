"""The KV cache as a tensor: plain, in place, of any dtype and shape, with memory only under what is held."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import torch_elastic_mem as tem
from tests.rungs import MiB, Rung

G = 2 * MiB
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
QUANTIZED = [d for d in DTYPES if str(d).startswith(("torch.qint", "torch.quint"))]
PLAIN = [d for d in DTYPES if d not in QUANTIZED]


@pytest.fixture
def account(rung: Rung) -> Iterator[tem.Account]:
    with rung.arena(64 * MiB) as arena, arena.account("serving") as made:
        yield made


def cache(account: tem.Account, num_blocks: int = 16, **options: Any) -> tem.ElasticKVTensor:
    """Blocks of half a granule."""
    return tem.ElasticKVTensor(account, num_blocks, (G // 4,), torch.bfloat16, **options)


def test_the_list_of_dtypes_is_torchs() -> None:
    names = {str(dtype).removeprefix("torch.") for dtype in PLAIN}
    assert {"bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool", "int8"} <= names
    assert QUANTIZED


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_any_dtype_is_read_back_as_it_was_written(account: tem.Account, dtype: torch.dtype) -> None:
    with tem.ElasticKVTensor(account, 4, (3, 8), dtype) as kv:
        assert (kv.tensor.dtype, kv.tensor.shape) == (dtype, (4, 3, 8))
        assert kv.block_bytes == 24 * dtype.itemsize
        kv.ensure([1])
        data = torch.arange(kv.block_bytes, dtype=torch.uint8, device=kv.tensor.device).remainder(2)
        kv.tensor[1].view(torch.uint8).copy_(data.view(3, -1))
        assert torch.equal(kv.tensor.view(torch.uint8)[1].flatten(), data)
        kv.ensure([3])
        kv.copy_blocks([(1, 3)])
        assert torch.equal(kv.tensor.view(torch.uint8)[3].flatten(), data)


@pytest.mark.parametrize("block_shape", [(), (1,), (16, 8, 128), (2, 3, 5, 7)])
@pytest.mark.parametrize("layers", [None, 1, 3])
def test_layouts_have_the_shapes_they_promise(
    account: tem.Account, block_shape: tuple[int, ...], layers: int | None
) -> None:
    middle = () if layers is None else (layers,)
    with tem.ElasticKVTensor(account, 5, block_shape, torch.float16, layers=layers) as kv:
        assert kv.tensor.shape == (5, *middle, *block_shape)
        assert kv.tensor.is_contiguous()
        for i in range(layers or 0):
            assert kv.layer(i).shape == (5, *block_shape)
            assert kv.layer(i).data_ptr() == kv.tensor[:, i].data_ptr()
    if layers is None:
        return
    with tem.ElasticKVTensor(account, 5, block_shape, torch.float16, layers=layers, layout="layer") as kv:
        assert [t.shape for t in kv.tensors] == [(5, *block_shape)] * layers
        assert all(kv.layer(i).data_ptr() == kv.tensors[i].data_ptr() for i in range(layers))
        assert len({t.data_ptr() for t in kv.tensors}) == layers
        with pytest.raises(tem.InvalidArgument, match=r"use layer\(i\)"):
            _ = kv.tensor


def test_it_is_a_plain_tensor_over_the_reserved_addresses(account: tem.Account) -> None:
    with cache(account) as kv:
        assert type(kv.tensor) is torch.Tensor
        assert kv.tensor.data_ptr() == kv._core.base(0)
        assert not kv.tensor.requires_grad
        assert kv.tensor.untyped_storage().nbytes() == 16 * kv.block_bytes
        assert kv.resident_bytes == account.held == 0


@pytest.mark.parametrize("layout", ["block", "layer"])
def test_addresses_never_move_and_bytes_follow_the_blocks(account: tem.Account, layout: str) -> None:
    with cache(account, layers=2, layout=layout) as kv:
        addresses = [t.data_ptr() for t in kv.tensors]
        for turn in range(5):
            blocks = range(turn, 16, turn + 1)
            kv.ensure(blocks)
            for block in blocks:
                for layer in range(2):
                    kv.layer(layer)[block].fill_(block + layer)
            assert kv.live_bytes == len(blocks) * kv.block_bytes <= kv.resident_bytes == account.held
            assert all(float(kv.layer(1)[block].float().mean()) == block + 1 for block in blocks)
            kv.release(blocks)
            assert kv.live_bytes == kv.resident_bytes == account.held == 0
            assert [t.data_ptr() for t in kv.tensors] == addresses


def test_an_extent_goes_back_with_its_last_block(account: tem.Account) -> None:
    with cache(account) as kv:
        kv.ensure([0, 1])
        assert account.held == G
        kv.release([0])
        assert account.held == G
        assert kv.is_resident(0), "the extent stays for its other block"
        kv.ensure([0])
        kv.release([1])
        kv.release([0])
        assert account.held == 0
        assert not kv.is_resident(0)


def test_held_blocks_stay_held_once_however_often_they_are_ensured(account: tem.Account) -> None:
    with cache(account) as kv:
        kv.ensure([3, 3, 2])
        kv.ensure([3])
        assert kv.live_bytes == 2 * kv.block_bytes
        kv.release([3, 2])
        assert account.held == 0


def test_idle_bytes_up_to_keep_stay_until_somebody_needs_them(rung: Rung) -> None:
    with (
        rung.arena(8 * G) as arena,
        arena.account("a") as a,
        arena.account("b", "serving") as b,
        cache(a, keep=3 * G) as kv,
        cache(b) as other,
    ):
        for block in range(0, 10, 2):  # one by one: an extent each
            kv.ensure([block])
        kv.release(range(0, 10, 2))
        assert a.held == 3 * G
        other.ensure(range(14))
        assert (a.held, b.held) == (G, 7 * G)
        assert a.trim() == G
        other.release(range(14))


def test_memory_of_another_account_reads_as_zeros(rung: Rung) -> None:
    with (
        rung.arena(4 * G, reserve=(0, 2 * G)) as arena,
        arena.account("a") as a,
        arena.account("b") as b,
        cache(a) as kv,
        cache(b) as other,
    ):
        kv.ensure(range(4))
        kv.tensor[:4].fill_(7)
        kv.release(range(4))
        other.ensure(range(4))
        assert not other.tensor[:4].any()
        other.release(range(4))


def test_memory_goes_behind_the_stream_it_was_released_on(rung: Rung) -> None:
    with rung.arena() as arena, arena.account("serving") as account, cache(account) as kv:
        stream = rung.stream()
        kv.ensure([0, 1])
        stream.submit()
        kv._core.release([0, 1], stream.handle)
        arena.collect()
        assert account.held == G
        assert arena.snapshot().limbo == G
        stream.complete()
        arena.collect()
        assert account.held == arena.snapshot().limbo == 0


@pytest.mark.parametrize("blocks", [[16], [-1], [0, 99], [2**40], [2**80]])
@pytest.mark.parametrize("call", ["ensure", "release"])
def test_a_block_out_of_range_is_refused_and_named(
    account: tem.Account, blocks: list[int], call: str
) -> None:
    with cache(account) as kv:
        kv.ensure([0])
        with pytest.raises(tem.BlockError, match=str(blocks[-1])):
            getattr(kv, call)(blocks)
        assert kv.live_bytes == kv.block_bytes
        kv.release([0])


@pytest.mark.parametrize("block", [16, -1, 2**80, 1.5, "x", None])
def test_residency_of_no_block_is_refused(account: tem.Account, block: Any) -> None:
    with cache(account) as kv, pytest.raises(tem.BlockError):
        kv.is_resident(block)


@pytest.mark.parametrize("blocks", [[1], [0, 1], [0, 0]])
def test_a_release_of_what_is_not_held_or_named_twice_is_refused(
    account: tem.Account, blocks: list[int]
) -> None:
    with cache(account) as kv:
        kv.ensure([0])
        with pytest.raises(tem.BlockError, match="not held, or named twice"):
            kv.release(blocks)
        assert kv.live_bytes == kv.block_bytes
        kv.release([0])


def test_out_of_memory_says_who_holds_what_and_changes_nothing(account: tem.Account) -> None:
    with cache(account, 100) as kv:
        kv.ensure([0])
        with pytest.raises(
            tem.OutOfMemory, match=r"'serving' asked for .* free .*Holders: serving holds 2 MiB"
        ):
            kv.ensure(range(100), timeout=0.01)
        assert (kv.live_bytes, account.held) == (kv.block_bytes, G)
        kv.release([0])


@pytest.mark.parametrize("index", [-1, 2, 99])
@pytest.mark.parametrize("layout", ["block", "layer"])
def test_an_unknown_layer_is_refused(account: tem.Account, index: int, layout: str) -> None:
    with cache(account, layers=2, layout=layout) as kv, pytest.raises(tem.InvalidArgument, match="no layer"):
        kv.layer(index)


@pytest.mark.parametrize("layout", ["block", "layer"])
def test_closing_under_live_tensors_is_refused_and_all_stays_usable(
    account: tem.Account, layout: str
) -> None:
    kv = cache(account, layers=2, layout=layout)
    kv.ensure([0])
    view = kv.layer(1)[0]
    view.fill_(3)
    with pytest.raises(tem.InUseError, match="tensors over it"):
        kv.close()
    assert view.data_ptr() == kv.layer(1)[0].data_ptr()
    assert float(kv.layer(1)[0, 0]) == 3
    kv.ensure([5])
    with pytest.raises(tem.InUseError, match="KV cache of 16 blocks"):
        account.close()
    del view
    kv.close()
    kv.close()
    assert account.held == 0


def test_a_closed_cache_says_so(account: tem.Account) -> None:
    kv = cache(account, layers=2)
    kv.close()
    calls = (
        lambda: kv.tensor,
        lambda: kv.layer(0),
        lambda: kv.ensure([0]),
        lambda: kv.release([0]),
        lambda: kv.copy_blocks([(0, 1)]),
        lambda: tem.BlockPool(kv).allocate(1),
    )
    for call in calls:
        with pytest.raises((tem.ClosedError, tem.NotResident)):
            call()


def test_tensors_that_outlive_the_cache_keep_their_memory(account: tem.Account) -> None:
    kv = cache(account)
    kv.ensure([2])
    block = kv.tensor[2]
    block.fill_(5)
    del kv
    gc.collect()
    assert account.held == G
    assert float(block.float().mean()) == 5
    with pytest.raises(tem.InUseError):
        account.close()
    del block
    gc.collect()
    assert account.held == 0


def test_blocks_are_copied_in_every_layer(account: tem.Account) -> None:
    for layout in ("block", "layer"):
        with cache(account, layers=3, layout=layout) as kv:
            kv.ensure([0, 9, 10])
            for layer in range(3):
                kv.layer(layer)[9].fill_(layer + 1)
            kv.copy_blocks([(9, 0), (9, 10)])
            assert [float(kv.layer(i)[b, -1]) for i in range(3) for b in (0, 10)] == [1, 1, 2, 2, 3, 3]
            with pytest.raises(tem.InvalidArgument, match="order"):
                kv.copy_blocks([(0, 9), (9, 10)])


@pytest.mark.parametrize("pair", [(0, 15), (15, 0), (0, 16), (-1, 0)])
def test_copies_from_or_to_no_memory_are_refused(account: tem.Account, pair: tuple[int, int]) -> None:
    with cache(account) as kv:
        kv.ensure([0])
        with pytest.raises((tem.NotResident, tem.BlockError)):
            kv.copy_blocks([pair])
