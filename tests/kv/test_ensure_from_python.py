"""What `ensure`, `release` and the pool take as block numbers, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import torch_elastic_mem as tem
from tests.rungs import MiB, Rung


class Index:
    def __index__(self) -> int:
        return 3


class Broken:
    def __iter__(self) -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("no more")


@pytest.fixture
def kv(rung: Rung) -> Iterator[tem.ElasticKVTensor]:
    with (
        rung.arena(32 * MiB) as arena,
        arena.account("serving") as account,
        tem.ElasticKVTensor(account, 8, (1024,), torch.uint8) as made,
    ):
        yield made
        assert made.live_bytes == 0, "what was refused was held after all"


GOOD: dict[str, Any] = {
    "list": [1, 3],
    "tuple": (1, 3),
    "range": range(1, 4, 2),
    "range that falls": range(3, 0, -2),
    "set": {1, 3},
    "dict keys": {1: "a", 3: "b"}.keys(),
    "deque": __import__("collections").deque([1, 3]),
    "array": __import__("array").array("i", [1, 3]),
    "numpy array": np.array([1, 3]),
    "numpy array of bytes": np.array([1, 3], dtype=np.uint8),
    "numpy array with strides": np.arange(8)[1:5:2],
    "list of numpy integers": [np.int64(1), np.uint8(3)],
    "torch tensor": torch.tensor([1, 3]),
    "torch tensor of int32": torch.tensor([1, 3], dtype=torch.int32),
    "list of torch scalars": [torch.tensor(1), torch.tensor(3)],
    "list of what is an index": [1, Index()],
}


@pytest.mark.parametrize("blocks", GOOD.values(), ids=list(GOOD))
def test_any_container_of_integers_names_blocks(kv: tem.ElasticKVTensor, blocks: Any) -> None:
    kv.ensure(blocks)
    assert [block for block in range(8) if kv._core.held(block)] == [1, 3]
    kv.release(blocks)
    pool = tem.BlockPool(kv)
    pool.allocate(8)
    pool.free(blocks)
    assert pool.num_free == 2
    pool.free([0, 2, 4, 5, 6, 7])


def test_an_iterator_is_used_up_once(kv: tem.ElasticKVTensor) -> None:
    kv.ensure(block for block in (1, 3))
    kv.release(iter([1, 3]))


@pytest.mark.parametrize("blocks", [[], (), range(0), range(5, 5), set(), np.array([], dtype=int), iter(())])
def test_no_blocks_are_nothing_to_do(kv: tem.ElasticKVTensor, blocks: Any) -> None:
    kv.ensure(blocks)
    kv.release(blocks)


NO_INTEGERS: dict[str, Any] = {
    "a number": 3,
    "nothing": None,
    "a text": "13",
    "a list of texts": ["1"],
    "fractions": [1.0],
    "an array of fractions": np.array([1.0, 2.0]),
    "a tensor of fractions": torch.tensor([1.0]),
    "truths": [True, False],
    "a mask": np.array([True, False]),
    "a torch mask": torch.tensor([False, True]),
    "lists": [[1, 2]],
    "a matrix": np.ones((2, 2), dtype=int),
    "a torch matrix": torch.ones((2, 2), dtype=torch.int64),
    "a tensor without dimensions": torch.tensor(3),
    "nothing in a list": [1, None],
}


@pytest.mark.parametrize("blocks", NO_INTEGERS.values(), ids=list(NO_INTEGERS))
@pytest.mark.parametrize("call", ["ensure", "release"])
def test_what_is_no_integers_is_refused(kv: tem.ElasticKVTensor, blocks: Any, call: str) -> None:
    with pytest.raises(tem.InvalidArgument) as refused:
        getattr(kv, call)(blocks)
    assert not isinstance(refused.value, tem.BlockError)


@pytest.mark.parametrize(
    "blocks",
    [
        *([8], [-1], [2**63], [-(2**80)], range(4, 9), range(2**40), range(0, 2**70, 2**69), range(-1, 3)),
        *(np.array([2**64 - 1], dtype=np.uint64), torch.tensor([-1])),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["ensure", "release"])
def test_blocks_that_there_are_not_are_refused(kv: tem.ElasticKVTensor, blocks: Any, call: str) -> None:
    with pytest.raises(tem.BlockError, match="out of range"):
        getattr(kv, call)(blocks)


def test_an_iterator_that_raises_is_passed_on(kv: tem.ElasticKVTensor) -> None:
    with pytest.raises(ZeroDivisionError, match="no more"):
        kv.ensure(Broken())


@pytest.mark.parametrize("count", [0, -1, 1.0, None, "2", 2**70])
def test_a_pool_allocates_positive_integers_of_blocks(kv: tem.ElasticKVTensor, count: Any) -> None:
    pool = tem.BlockPool(kv)
    with pytest.raises(tem.InvalidArgument):
        pool.allocate(count)
    with pytest.raises(tem.InvalidArgument):
        pool.plan_compaction(max_copies="3" if count is None else count)


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
def test_a_negative_timeout_is_refused(kv: tem.ElasticKVTensor, timeout: float) -> None:
    with pytest.raises(tem.InvalidArgument, match="timeout"):
        kv.ensure([0], timeout=timeout)
    with pytest.raises(tem.InvalidArgument, match="timeout"):
        tem.BlockPool(kv).allocate(1, timeout=timeout)


def test_a_long_timeout_is_no_overflow(kv: tem.ElasticKVTensor) -> None:
    kv.ensure([0], timeout=float("inf"))
    kv.release([0])


def test_a_cache_has_one_pool_at_a_time(kv: tem.ElasticKVTensor) -> None:
    pool = tem.BlockPool(kv)
    with pytest.raises(tem.InUseError, match="has a block pool already"):
        tem.BlockPool(kv)
    pool.free(pool.allocate(1))
    del pool
    pool = tem.BlockPool(kv)
    pool.free(pool.allocate(1))
