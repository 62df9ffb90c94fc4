"""`kv.checked()`: what would touch a block without memory raises before it does; the rest goes through."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

import torch_elastic_mem as tem
from tests.rungs import MiB, Rung

G = 2 * MiB
HELD, ABSENT = [0, 1, 6], [2, 5, 7]  # blocks as large as an extent
Operation = Callable[[torch.Tensor, list[int]], object]  # on one layer's tensor and the blocks it names


@pytest.fixture(params=["block", "layer"])
def kv(rung: Rung, request: pytest.FixtureRequest) -> Iterator[tem.ElasticKVTensor]:
    with (
        rung.arena(64 * MiB) as arena,
        arena.account("serving") as account,
        # float32; with two layers inside a block, half an extent each
        tem.ElasticKVTensor(
            *(account, 8, (2, G // 16 if request.param == "block" else G // 8), torch.float32),
            layers=2,
            layout=request.param,
        ) as made,
    ):
        for block in HELD:
            made.ensure([block])
            for layer in range(2):
                made.layer(layer)[block, :, :8].fill_(block + 1)
        assert [made.is_resident(block) for block in range(8)] == [block in HELD for block in range(8)]
        yield made


def index(blocks: list[int], x: torch.Tensor | None = None) -> torch.Tensor:
    return torch.tensor(blocks, device=None if x is None else x.device)


def mask(blocks: list[int], x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(8, dtype=torch.bool, device=x.device).index_fill_(0, index(blocks, x), True)


def rows(x: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    return x.new_zeros(len(blocks), *x.shape[1:])


# Each touches every block it is given, and no other.
BY_BLOCK: dict[str, Operation] = {
    "read": lambda x, b: [x[i].sum() for i in b],
    "read of a corner": lambda x, b: [float(x[i, -1, -1]) for i in b],
    "clone": lambda x, b: [x[i].clone() for i in b],
    "fill_": lambda x, b: [x[i].fill_(1) for i in b],
    "zero_ of a part": lambda x, b: [x[i, 1, :4].zero_() for i in b],
    "assignment": lambda x, b: [x.__setitem__(i, 1.0) for i in b],
    "copy_ into": lambda x, b: [x[i].copy_(x.new_zeros(x.shape[1:])) for i in b],
    "copy_ from": lambda x, b: [x.new_zeros(x.shape[1:]).copy_(x[i]) for i in b],
    "out=": lambda x, b: [torch.add(x.new_ones(x.shape[1:]), 1, out=x[i]) for i in b],
    "matmul": lambda x, b: [x[i] @ x.new_zeros(x.shape[2], 1) for i in b],
    "matmul of a transpose": lambda x, b: [x.new_zeros(1, 2) @ x[i] @ x[i].T for i in b],
    "cat": lambda x, b: torch.cat([x[i] for i in b]),
    "stack of parts": lambda x, b: torch.stack([x[i, 0] for i in b]),
    "slices": lambda x, b: [x[i : i + 1].mul_(2) for i in b],
    "unbind": lambda x, b: [x.unbind(0)[i].sum() for i in b],
    "index": lambda x, b: x[index(b, x)],
    "index from the end": lambda x, b: x[index(b, x) - 8],
    "index of one row": lambda x, b: x[index(b, x), 1],
    "index by a list": lambda x, b: x[b],
    "index by a mask": lambda x, b: x[mask(b, x)],
    "index_put": lambda x, b: x.__setitem__(index(b, x), 1.0),
    "index_put by a mask": lambda x, b: x.__setitem__(mask(b, x), 1.0),
    "index_put_ that accumulates": lambda x, b: x.index_put_((index(b, x),), rows(x, b), accumulate=True),
    "index_select": lambda x, b: torch.index_select(x, 0, index(b, x)),
    "index_select into": lambda x, b: torch.index_select(x, 0, index(b, x), out=rows(x, b)),
    "index_copy_": lambda x, b: x.index_copy_(0, index(b, x), rows(x, b)),
    "index_add_": lambda x, b: x.index_add_(0, index(b, x), rows(x, b)),
    "index_fill_": lambda x, b: x.index_fill_(0, index(b, x), 2.0),
    "index of a slice": lambda x, b: x[:, 1:][index(b, x)],
}
# Each touches all blocks.
WHOLE: dict[str, Callable[[torch.Tensor], object]] = {
    "sum": lambda x: x.sum(),
    "clone": lambda x: x.clone(),
    "zero_": lambda x: x.zero_(),
    "add": lambda x: x + 1,
    "index_select by column": lambda x: torch.index_select(x, 1, index([0], x)),
    "a column": lambda x: x[:, 0, 0].sum(),
    "index behind the blocks": lambda x: x[:, index([0], x)],
    "index_put out of place": lambda x: x.index_put((index(HELD, x),), rows(x, HELD)),
    "index_copy out of place": lambda x: x.index_copy(0, index(HELD, x), rows(x, HELD)),
    "repr": repr,
    "tolist": lambda x: x.tolist(),
    "contiguous of a permutation": lambda x: x.transpose(0, 1).contiguous(),
}
# Each touches none.
SHAPE: dict[str, Callable[[torch.Tensor], object]] = {
    "shape": lambda x: (x.shape, x.stride(), x.numel(), x.dtype, x.device, x.data_ptr()),
    "select": lambda x: x[2],
    "slice": lambda x: x[2:6, 1],
    "view": lambda x: x.view(8, -1),
    "view of bytes": lambda x: x.view(8, -1).view(torch.uint8),
    "transpose": lambda x: x.transpose(0, 2).mT,
    "expand": lambda x: x[2:3].expand(5, -1, -1),
    "detach": lambda x: x.detach(),
    "unfold": lambda x: x.unfold(0, 2, 1),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 1)),
    "empty_like": lambda x: torch.empty_like(x[2]),
    "zeros_like": lambda x: torch.zeros_like(x[2]),
    "new_zeros": lambda x: x.new_zeros(3),
    "an empty slice": lambda x: x[2:2].sum(),
    "an empty index": lambda x: x[index([]).long()],
}


def touches_whole(kv: tem.ElasticKVTensor, name: str) -> bool:
    """Whether CUDA's kernel goes through all of the cache, whatever blocks are named."""
    sorts = not kv.layer(0).is_contiguous() and name.endswith("accumulates")
    return kv.tensors[0].is_cuda and (sorts or name == "index_put by a mask")


@pytest.mark.parametrize("name", BY_BLOCK)
def test_what_touches_blocks_with_memory_goes_through(kv: tem.ElasticKVTensor, name: str) -> None:
    with kv.checked(), pytest.raises(tem.NotResident) if touches_whole(kv, name) else nullcontext():
        for layer in range(2):
            BY_BLOCK[name](kv.layer(layer), HELD)


@pytest.mark.parametrize("name", BY_BLOCK)
def test_what_touches_a_block_without_memory_is_refused(kv: tem.ElasticKVTensor, name: str) -> None:
    for layer, block in itertools.product(range(2), ABSENT):
        named = "2, 3, 4, 5, 7" if touches_whole(kv, name) else str(block)
        with kv.checked(), pytest.raises(tem.NotResident, match=rf"without memory in a KV .*: {named};"):
            BY_BLOCK[name](kv.layer(layer), [0, block, 6])


@pytest.mark.parametrize("name", WHOLE)
def test_what_touches_the_whole_cache_is_refused(kv: tem.ElasticKVTensor, name: str) -> None:
    with (
        kv.checked(),
        pytest.raises(tem.NotResident, match=r"(aten::|Tensor\.)\S+ would touch 5 blocks .*: 2, 3, 4, 5, 7;"),
    ):
        WHOLE[name](kv.layer(1))


@pytest.mark.parametrize("name", SHAPE)
def test_views_and_questions_of_shape_go_through(kv: tem.ElasticKVTensor, name: str) -> None:
    with kv.checked():
        SHAPE[name](kv.layer(0))


def test_a_refused_write_has_written_nothing(kv: tem.ElasticKVTensor) -> None:
    with kv.checked(), pytest.raises(tem.NotResident):
        kv.layer(0)[index([0, 2])] = 9.0
    assert float(kv.layer(0)[0].max()) == 1


def test_blocks_are_seen_as_they_are_at_that_moment(kv: tem.ElasticKVTensor) -> None:
    with kv.checked():
        kv.ensure([2])
        kv.layer(0)[2].zero_()
        kv.release([2])
        with pytest.raises(tem.NotResident):
            kv.layer(0)[2].zero_()


def test_tensors_of_others_are_not_looked_at(kv: tem.ElasticKVTensor) -> None:
    other = torch.ones(8, 4)
    with kv.checked():
        assert float((other @ other.T).sum()) == 256
        assert torch.equal(other[index(ABSENT)], torch.ones(3, 4))


def test_results_and_gradients_are_those_without_the_check(kv: tem.ElasticKVTensor) -> None:
    weight = torch.ones(kv.layer(0).shape[2], device=kv.layer(0).device, requires_grad=True)
    plain = (kv.layer(0)[index(HELD)] @ weight).sum()
    (wanted,) = torch.autograd.grad(plain, weight)
    with kv.checked():
        checked = (kv.layer(0)[index(HELD)] @ weight).sum()
        (got,) = torch.autograd.grad(checked, weight)
    assert torch.equal(plain, checked)
    assert torch.equal(wanted, got)


def test_it_is_this_threads_alone_and_ends_with_the_block(kv: tem.ElasticKVTensor) -> None:
    refused = []

    def look() -> None:
        with pytest.raises(tem.NotResident), kv.checked():
            kv.layer(0)[2].sum()
        refused.append(True)

    with kv.checked():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    look()
    assert refused == [True, True]
    assert float(kv.layer(0)[0].max()) == 1
