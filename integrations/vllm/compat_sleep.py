"""What differs in sleep and wake-up between the releases of vLLM that `compat` knows.

Facts, each read in the release's wheel:

* Up to 0.28 any `wake_up` restores the buffers that level 2 has saved, whether or not the weights are back,
  and `post_kv_cache_wake_up` restores what vLLM's own allocator would have lost beside the KV cache: the V1
  runner zeroes all of a quantized cache for it.
* A worker's `sleep` at level 2 saves the model's buffers first, asleep or not.
* From 0.33 what LoRA keeps beside a model is allocated, while that is loaded, in a pool of vLLM's own that
  is kept at both levels; up to 0.32 it lies with the weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any


def other_sleep(model_config: Any) -> str | None:
    """Why an engine cannot sleep by the arena, if it is configured to sleep in another way."""
    backend = model_config.sleep_mode_backend
    if backend != "cumem":
        return f"it sleeps by a backend of its own, {backend}"
    if getattr(model_config, "sleep_mode_offload_cudagraph", False):
        return "what CUDA graphs work in sleeps under `tem run` only, and there of itself"
    if getattr(model_config, "enable_nccl_comm_suspend", False):
        return "all ranks suspend their communicators together, and a rank that is refused memory would not"
    return None


@contextmanager
def capturing_into(pool: tuple[int, int]) -> Iterator[None]:
    """Within the block whatever captures CUDA graphs is given this pool of torch's to draw on.

    It asks when the model is loaded, when the cache is made, or when it captures, and keeps the answer.
    """
    from vllm.platforms import current_platform

    keeper = type(current_platform)
    before, keeper._global_graph_pool = keeper._global_graph_pool, pool
    try:
        yield
    finally:
        # The next engine of this process may not sleep when this one does.
        keeper._global_graph_pool = before


@contextmanager
def waking(worker: Any, tags: Sequence[str] | None) -> Iterator[None]:
    """Within the block `Worker.wake_up` touches only what has memory, and restores only what was lost."""
    aside: dict[str, Any] = {}
    if tags is not None and "weights" not in tags:
        for name, empty in (
            ("_sleep_saved_buffers", {}),
            ("_sleep_rebuild_draft_metadata_buffers", False),
        ):
            if hasattr(worker, name):
                aside[name] = getattr(worker, name)
                setattr(worker, name, empty)
    runner = worker.model_runner
    restores = hasattr(runner, "post_kv_cache_wake_up")
    if restores:
        runner.post_kv_cache_wake_up = lambda: None
    try:
        yield
    finally:
        for name, value in aside.items():
            setattr(worker, name, value)
        if restores:
            del runner.post_kv_cache_wake_up


@contextmanager
def lora_states_in(allocations: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    """Within the block what LoRA keeps beside a model is allocated in what is given for its tag."""
    lora: Any = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin")
    plain = getattr(lora, "get_mem_allocator_instance", None)
    if plain is None:
        yield
        return
    lora.get_mem_allocator_instance = lambda: SimpleNamespace(use_memory_pool=allocations)
    try:
        yield
    finally:
        lora.get_mem_allocator_instance = plain
