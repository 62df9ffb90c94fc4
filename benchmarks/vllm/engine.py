"""A vLLM engine in this process, stock, on an arena or by kvcached, whose inside can be looked at."""

from __future__ import annotations

import os
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.vllm import shapes

OURS = "ours"
STOCK = "stock"
# Stock as well: how far two engines of one kind are apart.
CONTROL = "stock, again"
KVCACHED = "kvcached"
# What has kvcached change vLLM as it is imported; its patches need the V1 runner.
_KVCACHED = {
    "ENABLE_KVCACHED": "true",
    "KVCACHED_AUTOPATCH": "1",
    "KVCACHED_IPC_NAME": "tem-bench",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


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


def opening_of(on_cuda: bool, shape: str | None, eager: bool) -> Opening:
    """That of the benchmarks of one engine: Llama's shape and 15 GiB on a GPU, a tiny one elsewhere."""
    if on_cuda:
        return Opening(shape or "llama-8b", 15 << 30, 4096, eager)
    return Opening(shape or "tiny", 64 << 20, 1024, eager=True)


def prepare(contender: str, **variables: str) -> None:
    """Sets this process's environment, before vLLM is imported.

    Args:
        contender: STOCK, CONTROL, OURS or KVCACHED.
        variables: more of it.

    Raises:
        ImportError: kvcached is wanted and not installed.
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
    if contender == KVCACHED:
        os.environ.update(_KVCACHED | variables)
        # Its patches come with vLLM's modules; a `.pth` file of its own has done this where it was installed.
        import_module("kvcached.autopatch")


class Engine:
    """The engine, and what only one who shares its process can see.

    Attributes:
        llm: vLLM's `LLMEngine`.
        scheduler, worker: its parts.
        cache, arena: of an engine on an arena; None of a stock one.
        block_bytes: what a block takes of the cache.
        preempted: requests that it has preempted, one that came back and was preempted again twice.
        waited: seconds that steps of an engine on an arena have waited for memory.
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
        self._blocks = int(self.scheduler.cache_config.num_gpu_blocks)
        self.block_bytes = opening.kv_bytes // self._blocks
        self._seconds = time.perf_counter() - started
        self.preempted = 0
        self._count_preempted()
        self.waited = 0.0
        if ours:
            self._count_waits(self.scheduler.elastic.grower)

    def facts(self) -> dict[str, Any]:
        """For the result's raw part."""
        facts = {
            "seconds": self._seconds,
            "runner": type(self.worker.model_runner).__module__,
            "scheduler": type(self.scheduler).__name__,
            "blocks": self._blocks,
        }
        if self.cache is not None:
            facts |= {"chunk_bytes": self.cache.chunk_bytes, "uuid": self.arena.uuid}
        return facts

    def in_use(self) -> int:
        """Blocks that requests hold."""
        if self.cache is not None:
            with self.scheduler.elastic.lock:
                return int(self.scheduler.elastic.balloon.in_use())
        return self._blocks - 1 - int(self._pool.get_num_free_blocks())

    @property
    def moved(self) -> int:
        """Blocks of requests that have been moved."""
        mover = self.scheduler.elastic.mover if self.cache is not None else None
        return mover.moved if mover is not None else 0

    def _count_preempted(self) -> None:
        plain = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return plain(*args, **kwargs)

        self.scheduler._preempt_request = counted

    def _count_waits(self, grower: Any) -> None:
        plain = grower.wait

        def counted(seconds: float) -> None:
            begun = time.monotonic()
            plain(seconds)
            self.waited += time.monotonic() - begun

        grower.wait = counted
