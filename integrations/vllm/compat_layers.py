"""Which kinds of layers this integration knows, and how many blocks a request has of each.

Facts, each read in the releases' wheels:

* For a request a group of states takes `num_speculative_blocks` beyond those that its tokens fill, at once.
  The V2 runner's warm-up does so for as many requests as a step may have, in blocks counted from 1.
* Of a window vLLM admits a request by what it holds at most: a prompt is computed in parts, and blocks below
  the window are freed between two of them (`max_admission_blocks_per_request`, in 0.26 with `_` before it).
  Of states that are aligned with blocks (`mamba_cache_mode`) it holds the running one, and a copy of one that
  was found in part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch_elastic_mem.integrations.vllm.compat import Unsupported, layers

# Kinds of layers whose blocks are read by requests that hold them, and by nobody else.
LAYERS = {
    "ChunkedLocalAttentionSpec",
    "FullAttentionSpec",
    "MLAAttentionSpec",
    "MambaSpec",
    "SinkFullAttentionSpec",
    "SlidingWindowMLASpec",
    "SlidingWindowSpec",
    "TQFullAttentionSpec",
}


def require_known_layers(specs: Iterable[Any]) -> None:
    """Refuses layers whose blocks may be read while no request holds them.

    Args:
        specs: what each layer, or each group of them, keeps.

    Raises:
        Unsupported: some are of a kind that is not known here.
    """
    each = [layer for spec in specs for layer in layers(spec)]
    if any(getattr(getattr(layer, "kv_quant_mode", None), "is_per_token_head", False) for layer in each):
        raise Unsupported("its KV cache is quantized by token and head, and its scales are written whole")
    if unknown := sorted({type(layer).__name__ for layer in each} - LAYERS):
        raise Unsupported(f"its KV cache has layers of kinds that are not known here: {', '.join(unknown)}")


def require_on_device(config: Any) -> None:
    """Refuses a configuration of which a part lies in host memory.

    Raises:
        Unsupported: one does.
    """
    if any(getattr(tensor, "host_resident", False) for tensor in config.kv_cache_tensors):
        raise Unsupported("part of its KV cache lies in host memory")


def states(spec: Any) -> int:
    """Blocks of a group that a request takes beyond those its tokens fill."""
    names = ("num_speculative_blocks", "num_prefill_checkpoint_blocks")
    return sum(getattr(layers(spec)[0], name, 0) for name in names)


def most(manager: Any) -> int:
    """Blocks that a request has at most in a group, beyond its `states`, however long it is.

    Args:
        manager: vLLM's, of that group; its windows retain what `compat.retain_tiles` has them retain.
    """
    if getattr(manager, "mamba_cache_mode", None) == "align":
        return 2
    for name in ("max_admission_blocks_per_request", "_max_admission_blocks_per_request"):
        if (bound := getattr(manager, name, None)) is not None:
            return int(bound)
    return int(manager.block_pool.num_gpu_blocks)
