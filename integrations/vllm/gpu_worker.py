"""The GPU engine's worker: sized by its account, on a device that it shares."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import request_memory

from torch_elastic_mem.integrations.vllm import compat_sleep
from torch_elastic_mem.integrations.vllm.worker import Elastic
from torch_elastic_mem.torch_cuda import account_of_torch

# An allowance for the CUDA context, cuBLAS and graphs. It bounds addresses alone: what they really took is
# read after the warm-up.
CONTEXT = 1 << 30


class ElasticWorker(Elastic, Worker):
    """vLLM's GPU worker whose KV cache lies on an arena."""

    def init_device(self) -> None:
        """As vLLM's, without its demand that a share of the device be free now: neighbours yield later."""
        share = self.cache_config.gpu_memory_utilization
        self.cache_config.gpu_memory_utilization = 1e-6
        try:
            super().init_device()
        finally:
            self.cache_config.gpu_memory_utilization = share

    def determine_available_memory(self) -> int:
        """What the cache could come to if it had the device to itself, within the account's `max`.

        vLLM's own profiling charges to this engine what neighbours take meanwhile, and fails if they give
        something back. Here only this process's own peak is taken off.
        """
        config = self.cache_config
        if not self.keeps_what_is_known():
            self.requested_memory = request_memory(self.init_snapshot, config)
            return super().determine_available_memory()
        given = config.kv_cache_memory_bytes
        _, total = torch.cuda.mem_get_info(self.device)
        config.kv_cache_memory_bytes = given or total
        try:
            room = super().determine_available_memory()
        finally:
            config.kv_cache_memory_bytes = given
        arena = self.open_elastic_account(room)
        self.sized_by_account = True
        own = torch.cuda.max_memory_reserved(self.device)
        sleeps = 0 if self.elastic_sleep is None else self.elastic_sleep.bytes
        in_account = account_of_torch(arena.device) is not None
        # What sleeps is in a malloc of its own then, which torch does not count.
        own += sleeps if in_account else 0
        held = own if in_account else sleeps
        if given is None:
            room = min(room - own - CONTEXT, arena.capacity - held)
        return self.within_its_limit(room, held)

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's. What graphs and kernels took meanwhile outside the arena is not the cache's any more."""
        with self.capturing():
            done = super().compile_or_warm_up_model()
        if self.elastic_cache is None:
            return done
        arena = self.elastic_arena
        if arena.broker is None:
            free, _ = torch.cuda.mem_get_info(self.device)
            arena.set_capacity(min(arena.capacity, free + arena.snapshot().created))
        return done

    def _fall_asleep(self, level: int) -> None:
        """As vLLM's, of which a neighbour is no part."""
        try:
            super()._fall_asleep(level)
        except AssertionError:
            # It asserts that the device has more free than before. Who waited for this memory has it already.
            if self.elastic_sleep is None or self.elastic_sleep.state() != "SUSPENDED":
                raise

    def wake_up(self, tags: list[str] | None = None) -> None:
        """As vLLM's, as far as there is memory then."""
        with compat_sleep.waking(self, tags):
            super().wake_up(tags)
