"""A vLLM engine in this process, stock or on an arena, whose inside can be looked at."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.vllm import shapes

OURS = "ours"
STOCK = "stock"


class Opening(msgspec.Struct):
    """How an engine is made, the same for all contenders but for the bytes of its cache.

    Attributes:
        batched_tokens, seqs: of a step, at most; None: vLLM's own choice.
        block_size: tokens of a block; None: likewise.
    """

    shape: str
    kv_bytes: int
    max_model_len: int
    eager: bool
    batched_tokens: int | None = None
    seqs: int | None = None
    block_size: int | None = None


def prepare(contender: str, **variables: str) -> None:
    """Sets this process's environment, before vLLM is imported.

    Args:
        contender: STOCK or OURS.
        variables: more of it.
    """
    # It would go over the bytes that an engine is opened with.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    os.environ.update(
        variables,
        TEM_ENABLE="1" if contender == OURS else "0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )


class Engine:
    """The engine, and what only one who shares its process can see.

    Attributes:
        llm: vLLM's `LLMEngine`.
        scheduler, worker: its parts.
        cache, arena: of an engine on an arena; None of a stock one.
        block_bytes: what a block takes of the cache.
        preempted: requests that it has preempted, one that came back and was preempted again twice.
    """

    def __init__(self, opening: Opening) -> None:
        from vllm import LLM

        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            given = {
                "max_num_batched_tokens": opening.batched_tokens,
                "max_num_seqs": opening.seqs,
                "block_size": opening.block_size,
            }
            self.llm: Any = LLM(
                model=str(shapes.write(opening.shape, Path(folder))),
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=opening.max_model_len,
                kv_cache_memory_bytes=opening.kv_bytes,
                enforce_eager=opening.eager,
                seed=0,
                enable_prefix_caching=True,
                # Of no use to an engine whose cache is given, but each wants so much of the device free.
                gpu_memory_utilization=0.1,
                **{name: value for name, value in given.items() if value is not None},
            ).llm_engine
        core = self.llm.engine_core.engine_core
        self.scheduler: Any = core.scheduler
        self.worker: Any = core.model_executor.driver_worker.worker
        ours = os.environ["TEM_ENABLE"] == "1"
        self.cache: Any = self.worker.elastic_cache if ours else None
        self.arena: Any = self.worker.elastic_arena if ours else None
        self._pool = self.scheduler.kv_cache_manager.block_pool
        self.block_bytes = opening.kv_bytes // len(self._pool.blocks)
        self._seconds = time.perf_counter() - started
        self.preempted = 0
        self._count_preempted()

    def facts(self) -> dict[str, Any]:
        """For the result's raw part."""
        facts = {
            "seconds": self._seconds,
            "runner": type(self.worker.model_runner).__module__,
            "scheduler": type(self.scheduler).__name__,
            "blocks": len(self._pool.blocks),
        }
        if self.cache is not None:
            facts |= {"chunk_bytes": self.cache.chunk_bytes, "uuid": self.arena.uuid}
        return facts

    def in_use(self) -> int:
        """Blocks that requests hold."""
        if self.cache is not None:
            with self.scheduler.elastic.lock:
                return int(self.scheduler.elastic.balloon.in_use())
        return len(self._pool.blocks) - 1 - int(self._pool.get_num_free_blocks())

    def _count_preempted(self) -> None:
        plain = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return plain(*args, **kwargs)

        self.scheduler._preempt_request = counted
