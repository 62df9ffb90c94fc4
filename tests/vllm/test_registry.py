"""What of a process's engines is on an arena: an engine that ends leaves nothing behind."""

from __future__ import annotations

import gc

import pytest

pytest.importorskip("vllm")

import torch

import torch_elastic_mem as tem
from torch_elastic_mem.integrations.vllm import registry
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.compat import Region

MiB = 1 << 20


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> tem.Arena:
    monkeypatch.setattr(registry, "_host", None)
    return registry.arena_of(torch.device("cpu"), 64 * MiB)


def test_a_larger_engine_of_the_same_process_has_room_too(host: tem.Arena) -> None:
    assert host.capacity == 64 * MiB
    assert registry.arena_of(torch.device("cpu"), 16 * MiB) is host and host.capacity == 64 * MiB
    assert registry.arena_of(torch.device("cpu"), 256 * MiB) is host and host.capacity == 256 * MiB


def test_an_engine_that_has_ended_leaves_its_name_when_its_tensors_have_gone(host: tem.Arena) -> None:
    first = ElasticCache(registry.open_account(host), 32, [Region(32 * MiB, MiB)])
    registry.keep("a", first)
    with first.handed_out():
        views = torch.zeros(32 * MiB, dtype=torch.int8)
    registry.forget("a")
    assert registry.find("a") is None
    second = registry.open_account(host)
    assert (first.account.name, second.name) == ("vllm", "vllm-2")
    del first, views
    gc.collect()
    assert registry.open_account(host).name == "vllm"
    registry.forget("a")
