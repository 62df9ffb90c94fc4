"""What vLLM's worker restores after a wake-up, in each kind of release."""

from __future__ import annotations

import inspect
import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.compilation import cuda_graph
from vllm.platforms import current_platform
from vllm.v1.worker import lora_model_runner_mixin
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu_worker import Worker

from torch_elastic_mem.integrations.vllm import compat, compat_sleep


class Runner:
    def post_kv_cache_wake_up(self) -> str:
        return "restored"


def worker(runner: Any) -> Any:
    return SimpleNamespace(
        model_runner=runner, _sleep_saved_buffers={"a": 1}, _sleep_rebuild_draft_metadata_buffers=True
    )


def test_buffers_wait_for_the_weights() -> None:
    made = worker(SimpleNamespace())
    with compat_sleep.waking(made, ["kv_cache"]):
        assert (made._sleep_saved_buffers, made._sleep_rebuild_draft_metadata_buffers) == ({}, False)
    assert (made._sleep_saved_buffers, made._sleep_rebuild_draft_metadata_buffers) == ({"a": 1}, True)


@pytest.mark.parametrize("tags", [None, ["weights"], ["weights", "kv_cache"]])
def test_with_the_weights_they_are_restored(tags: list[str] | None) -> None:
    made = worker(SimpleNamespace())
    with compat_sleep.waking(made, tags):
        assert made._sleep_saved_buffers == {"a": 1}
        made._sleep_saved_buffers = {}
    assert made._sleep_saved_buffers == {}


def test_what_was_not_lost_beside_the_cache_is_not_restored() -> None:
    made = worker(Runner())
    with compat_sleep.waking(made, None):
        assert made.model_runner.post_kv_cache_wake_up() is None
    assert made.model_runner.post_kv_cache_wake_up() == "restored"


def test_a_refusal_leaves_what_is_to_be_restored() -> None:
    made = worker(Runner())
    with pytest.raises(MemoryError), compat_sleep.waking(made, ["kv_cache"]):
        raise MemoryError
    assert made._sleep_saved_buffers == {"a": 1}
    assert made.model_runner.post_kv_cache_wake_up() == "restored"


def test_what_lora_keeps_lies_where_a_runners_state_does_while_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = object()
    monkeypatch.setattr(lora_model_runner_mixin, "get_mem_allocator_instance", plain, raising=False)
    tags: list[str] = []

    def allocations(tag: str) -> Any:
        tags.append(tag)
        return nullcontext()

    with pytest.raises(MemoryError), compat_sleep.lora_states_in(allocations):
        allocator = lora_model_runner_mixin.get_mem_allocator_instance()
        with allocator.use_memory_pool(tag="runtime"):
            raise MemoryError
    assert tags == ["runtime"] and lora_model_runner_mixin.get_mem_allocator_instance is plain
    monkeypatch.delattr(lora_model_runner_mixin, "get_mem_allocator_instance")
    with compat_sleep.lora_states_in(allocations):
        assert not hasattr(lora_model_runner_mixin, "get_mem_allocator_instance")


def test_graphs_draw_on_the_pool_that_is_given_while_they_are_captured_and_no_longer() -> None:
    keeper = type(current_platform)
    before = keeper._global_graph_pool
    with pytest.raises(MemoryError), compat_sleep.capturing_into((0, 7)):
        assert current_platform.get_global_graph_pool() == (0, 7)
        raise MemoryError
    assert keeper._global_graph_pool == before


def test_this_release_asks_for_the_pool_when_it_makes_what_captures() -> None:
    asks = "= current_platform.get_global_graph_pool()"
    assert f"self.pool {asks}" in inspect.getsource(cudagraph_utils)
    assert f"self.graph_pool {asks}" in inspect.getsource(cuda_graph.CUDAGraphWrapper.__init__)


def test_this_release_has_what_a_sleep_goes_through() -> None:
    source = inspect.getsource(Worker)
    assert "self._sleep_mode_backend is None" in source
    assert "self._maybe_get_memory_pool_context(" in source
    assert "_sleep_saved_buffers" in source
    later = compat.release() != "0.26"
    tags = set(re.findall(r'memory_pool_context\((?:tag=)?"(\w+)"', source))
    assert tags == {"weights", "kv_cache"} | ({"runtime", "workspace"} if later else set())
