"""vLLM's own pool of blocks, and what tests do to it as its managers would."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def pool_of(blocks: int) -> Any:
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(num_gpu_blocks=blocks, enable_caching=True, hash_block_size=16)


def take(pool: Any, ids: Iterable[int]) -> list[Any]:
    """A request holds these very blocks; `get_new_blocks` would choose others."""
    blocks = [pool.blocks[block_id] for block_id in ids]
    pool.touch(blocks)
    return blocks


def fill(pool: Any, block: Any, content: int) -> None:
    """A request has filled its block; the prefix cache knows it by its content."""
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    pool._insert_block_hash(make_block_hash_with_group_id(hash_of(content), 0), block, 16)


def cached(pool: Any, content: int) -> bool:
    return find(pool, content) is not None


def find(pool: Any, content: int) -> Any:
    """The block in which the prefix cache has this; None: it has not."""
    found = pool.get_cached_block(hash_of(content), [0])
    return found and found[0]


def hash_of(content: int) -> Any:
    from vllm.v1.core.kv_cache_utils import BlockHash

    return BlockHash(content.to_bytes(32, "big"))


def leave(pool: Any, ids: Iterable[int], content: int | None = None) -> None:
    """A request filled these blocks, each with its number or this, and went; the last was used last."""
    blocks = take(pool, ids)
    for block in blocks:
        fill(pool, block, block.block_id if content is None else content)
    pool.free_blocks(blocks)


def free_ids(pool: Any) -> list[int]:
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


def unhashed_first(pool: Any) -> int:
    """Blocks at the queue's head that hold nothing."""
    count = 0
    for block in pool.free_block_queue.get_all_free_blocks():
        if block.block_hash is not None:
            break
        count += 1
    return count
