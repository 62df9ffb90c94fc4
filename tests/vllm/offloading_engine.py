"""The real engine with `OffloadingConnector`, whose copies wait: `python -m tests.vllm.offloading_engine`.

Prints a line of JSON a fact.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.vllm import shapes
from tests.vllm.engine import MiB, engine, fact, prompts, sampling
from tests.vllm.late_copies import NEVER, Offloading
from tests.vllm.models import CACHE, LLAMA
from tests.vllm.pressing import confine


class Engine:
    def __init__(self, folder: Path) -> None:
        self.copies = Offloading(NEVER)
        connector = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 64 * MiB},
        }
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": CACHE}
        self.llm = engine(folder, "llama", **sizes, kv_transfer_config=connector)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        worker = self.core.model_executor.driver_worker.worker
        self.arena, self.cache = worker.elastic_arena, worker.elastic_cache
        confine(self.arena, self.cache)

    def ask(self, seed: int, count: int, tokens: int, length: int = 100) -> None:
        for number, each in enumerate(prompts(seed, count)):
            prompt = {"prompt_token_ids": each["prompt_token_ids"][:length]}
            self.llm.llm_engine.add_request(f"{seed}-{number}", prompt, sampling(tokens))

    def held(self) -> set[int]:
        """The blocks of requests."""
        return {
            block.block_id
            for each in self.scheduler.kv_cache_manager.coordinator.single_type_managers
            for blocks in each.req_to_blocks.values()
            for block in blocks
        }

    def read(self) -> set[int]:
        return self.scheduler._copies.blocks() - {0}

    def squeeze(self) -> list[int]:
        """Somebody of a higher class wants all there is; returns the chunks that are left."""
        import torch_elastic_mem as tem

        account = self.arena.account("pressing", tem.PriorityClass("pressing", 10**6))
        memory = account.range(self.arena.capacity)
        with suppress(tem.OutOfMemory):
            memory.grow(self.arena.capacity, timeout=0.5)
        left = [chunk for chunk in range(self.cache.num_chunks) if self.cache._has_memory(chunk)]
        memory.close()
        account.close()
        return left

    def chunks(self, blocks: set[int]) -> list[int]:
        """Where these are, and the null block."""
        return sorted({block // self.cache.chunk_blocks for block in {0, *blocks}})

    def end(self) -> set[int]:
        """Steps until all requests have ended; the blocks that the last of them had."""
        held: set[int] = set()
        while self.llm.llm_engine.has_unfinished_requests():
            held = self.held() or held
            self.llm.llm_engine.step()
        return held

    def step_with(self, request: Any) -> bool:
        """Whether a request runs after a step."""
        self.llm.llm_engine.step()
        return request in self.scheduler.running

    def drain(self) -> None:
        """As the engine's own loop does while it has no requests."""
        while self.scheduler.has_requests():
            self.core.step_fn()


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["TEM_ENABLE"] = "1"
    os.dup2(2, 1)
    shapes.SHAPES["llama"] = LLAMA
    with tempfile.TemporaryDirectory() as name:
        each = Engine(Path(name))
        scheduler = each.scheduler
        fact("scheduler", type(scheduler).__name__)
        fact("what comes is waited for", each.cache.aside)

        each.ask(1, 8, 8)
        had = each.end()
        fact("ended", [len(had), sorted(had - each.read())])
        each.core.step_fn()  # what has just ended gets its copies
        read = each.read()
        fact("left", [each.squeeze(), each.chunks(read)])
        each.copies.late = 0
        each.drain()
        fact("copied", [len(read), sorted(each.read()), each.squeeze()])

        each.copies.late = NEVER
        each.ask(2, 4, 40)
        for _ in range(6):
            each.llm.llm_engine.step()
        with scheduler.elastic.lock:
            held, jobs = each.held(), each.read()
            assert scheduler._preempt_last()
            freed = held - each.held()
            known = scheduler.connector.connector_scheduler._req_status
            fact("preempted", [len(freed), sorted(_blocks(known) & freed)])
            fact("copies of the preempted", [len(jobs & freed), sorted(jobs - each.read())])
        each.end()
        each.core.step_fn()

        read = each.read()
        told = each.llm.reset_prefix_cache(reset_connector=True)
        fact("forgotten", [told, len(read), sorted(read - each.read())])
        each.ask(3, 1, 2)
        each.llm.llm_engine.step()
        fact("flushed", sorted(read & each.read() - each.held()))
        each.copies.late = 0
        each.end()
        each.drain()

        each.ask(4, 2, 8, length=10)  # of which there is nothing to be found elsewhere
        each.llm.llm_engine.step()
        with scheduler.elastic.lock:
            assert scheduler._preempt_last()
        victim = scheduler.waiting.peek_request()
        fact("running after each step", [each.step_with(victim) for _ in range(2)])
        each.end()
        each.drain()
        each.llm.llm_engine.engine_core.shutdown()


def _blocks(requests: Any) -> set[int]:
    return {
        number
        for request in requests.values()
        for group in request.group_states
        for number in group.block_ids
    }


if __name__ == "__main__":
    main()
