"""The CPU engine's worker, over an arena on the host."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from torch_elastic_mem.integrations.vllm.worker import Elastic


class ElasticCPUWorker(Elastic, CPUWorker):
    """vLLM's CPU worker whose KV cache lies on an arena."""

    def determine_available_memory(self) -> int:
        """What vLLM would take for the cache, at most the account's `max`."""
        found = super().determine_available_memory()
        self.open_elastic_account(found)
        limit = self.elastic_account.limits.max
        return found if limit is None else min(found, limit)
