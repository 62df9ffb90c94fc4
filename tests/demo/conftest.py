"""A demo small enough for a test: a model of two layers, an arena of a few extents."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import torch_elastic_mem as tem
from torch_elastic_mem.demo.device import equal_bits
from torch_elastic_mem.demo.model import Shape, initial_weights
from torch_elastic_mem.demo.phase import Stage
from torch_elastic_mem.demo.scale import Scale
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
def stage(scale: Scale, text: Text, initial: torch.Tensor) -> Iterator[Stage]:
    """Closes without error only if the test left nothing in the accounts."""
    arena = tem.Arena("host", capacity=scale.capacity)
    stage = Stage(arena, arena.account("training"), arena.account("serving", "serving"), scale, initial, text)
    yield stage
    stage.training.close()
    stage.serving.close()
    assert arena.snapshot().leased == 0
    arena.close()
