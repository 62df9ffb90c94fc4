"""The CPU engine's worker, over an arena on the host."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from torch_elastic_mem.integrations.vllm.worker import Elastic


class ElasticCPUWorker(Elastic, CPUWorker):
    """vLLM's CPU worker whose KV cache lies on an arena."""

    def determine_available_memory(self) -> int:
        """What vLLM would take for the cache, within the account's `max`."""
        found = super().determine_available_memory()
        if not self.keeps_what_is_known():
            return found
        self.open_elastic_account(found)
        return self.within_its_limit(found, 0 if self.elastic_sleep is None else self.elastic_sleep.bytes)

    def _fall_asleep(self, level: int) -> None:
        """What the GPU worker does; vLLM has none on the CPU."""
        if self.elastic_sleep is None:
            super()._fall_asleep(level)
            return
        if level == 2:
            buffers = self.model_runner.get_model().named_buffers()
            self._sleep_saved_buffers = {name: buffer.clone() for name, buffer in buffers}
        self.elastic_sleep.suspend(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """What the GPU worker does."""
        if self.elastic_sleep is None:
            super().wake_up(tags)
            return
        self.elastic_sleep.resume(tags)
        if not self.elastic_sleep.weights.away:
            for name, buffer in self.model_runner.get_model().named_buffers():
                if name in self._sleep_saved_buffers:
                    buffer.data.copy_(self._sleep_saved_buffers[name])
            self._sleep_saved_buffers = {}

    def discard(self, tags: tuple[str, ...]) -> None:
        """What the GPU worker does."""
        if self.elastic_sleep is None:
            super().discard(tags)
            return
        self.elastic_sleep.discard(tags)
