"""What a KV cache is not made of: sizes, dtypes and layouts that cannot be right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import torch_elastic_mem as tem

QUANTIZED = [torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4]


@pytest.fixture
def account() -> Iterator[tem.Account]:
    with tem.Arena("host", capacity="16MiB") as arena, arena.account("serving") as made:
        yield made


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_a_quantized_dtype_is_refused_with_advice(account: tem.Account, dtype: torch.dtype) -> None:
    with pytest.raises(tem.InvalidArgument, match="use the integer dtype beneath it"):
        tem.ElasticKVTensor(account, 4, (8,), dtype)


BAD = {
    "no blocks": {"num_blocks": 0},
    "negative blocks": {"num_blocks": -4},
    "a fraction of blocks": {"num_blocks": 2.5},
    "blocks that are no number": {"num_blocks": None},
    "an empty dimension": {"block_shape": (16, 0)},
    "a negative dimension": {"block_shape": (-1, 8)},
    "a shape that is a number": {"block_shape": 16},
    "a shape that is a text": {"block_shape": "16"},
    "more than there are addresses": {"num_blocks": 2**60, "block_shape": (2**60,)},
    "a product just beyond 64 bits": {"num_blocks": 2**32, "block_shape": (2**32,)},
    "more blocks than can be kept track of": {"num_blocks": 2**40, "block_shape": (1,)},
    "no dtype": {"dtype": None},
    "a dtype's name": {"dtype": "bfloat16"},
    "no layers": {"layers": 0},
    "an unknown layout": {"layout": "token"},
    "a layer layout without layers": {"layout": "layer"},
    "a negative keep": {"keep": -1},
    "a keep that is no size": {"keep": "lots"},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_what_cannot_be_right_is_refused(account: tem.Account, bad: dict[str, Any]) -> None:
    good: dict[str, Any] = {"num_blocks": 4, "block_shape": (8,), "dtype": torch.float16}
    with pytest.raises(tem.InvalidArgument):
        tem.ElasticKVTensor(account, **(good | bad))
    assert account.held == 0
