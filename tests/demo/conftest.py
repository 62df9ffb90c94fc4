"""A demo small enough for a test: a model of two layers, an arena of a few extents."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import torch_elastic_mem as tem
from torch_elastic_mem.demo.device import equal_bits
from torch_elastic_mem.demo.model import Shape, initial_weights
from torch_elastic_mem.demo.scale import Scale
from torch_elastic_mem.demo.stage import Stage
from torch_elastic_mem.demo.text import Text


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with equal_bits("host"):
        yield


@pytest.fixture(scope="session")
def scale() -> Scale:
    return Scale(
        capacity=32 << 20,
        shape=Shape(layers=2, width=32, heads=2, context=64),
        sequences=64,
        length=32,
        micro_batches=2,
        block_tokens=8,
        prompt_tokens=(16, 32),
        burst_requests=4,
        tokens_per_second=100,
    )


@pytest.fixture(scope="session")
def text() -> Text:
    return Text()


@pytest.fixture(scope="session")
def initial(scale: Scale) -> torch.Tensor:
    return initial_weights(scale.shape, 0)


@pytest.fixture
def arena(scale: Scale) -> Iterator[tem.Arena]:
    """Closes without error only if the test left nothing in its accounts."""
    # A step of training takes as long as the machine's other work lets it.
    with tem.Arena("host", capacity=scale.capacity, yield_timeout=30.0) as arena:
        yield arena
        assert arena.snapshot().leased == 0


@pytest.fixture
def trained(arena: tem.Arena, scale: Scale, text: Text, initial: torch.Tensor) -> Iterator[Stage]:
    """What training runs on."""
    with arena.account("training") as account:
        yield Stage(arena, account, scale, initial, text)


@pytest.fixture
def served(arena: tem.Arena, scale: Scale, text: Text, initial: torch.Tensor) -> Iterator[Stage]:
    """What serving runs on."""
    with arena.account("serving", "serving") as account:
        yield Stage(arena, account, scale, initial, text)
