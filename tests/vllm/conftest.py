"""Engines of 32 blocks. Nothing here is imported where vLLM is missing: the tests are skipped before."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the integration logs, once each: whether vLLM's loggers propagate is up to its configuration."""
    logger = logging.getLogger("vllm.torch_elastic_mem")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    return caplog


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Those to close at the end."""
    from torch_elastic_mem.integrations.vllm import controller, grower

    # What is refused stays so, and a step waits until it has got what it needs or was refused.
    monkeypatch.setattr(grower, "REST", 3600.0)
    monkeypatch.setattr(controller, "PATIENCE", 3600.0)
    made: list[Any] = []
    yield made
    for engine in made:
        engine.controller.close()


@pytest.fixture
def full(engines: list[Any]) -> Any:
    """All of its blocks have memory."""
    from tests.vllm.small_engine import BLOCKS, Engine

    engines.append(Engine(BLOCKS // 2))
    return engines[-1]


@pytest.fixture
def small(engines: list[Any]) -> Any:
    """Its first chunk has memory: the null block and one more."""
    from tests.vllm.small_engine import Engine

    engines.append(Engine(1))
    return engines[-1]


@pytest.fixture
def made() -> Iterator[list[Any]]:
    """Engines of several ranks, to close at the end."""
    engines: list[Any] = []
    yield engines
    for each in engines:
        each.close()


@pytest.fixture(scope="module")
def extension() -> None:
    """What has torch's CPU tensors lie in an arena is built for one torch."""
    import torch_elastic_mem as tem
    from torch_elastic_mem.extension import torch_extension

    try:
        torch_extension("_torch")
    except tem.TemError as missing:
        pytest.skip(str(missing))
