"""vLLM's executor of several processes, whose ranks meet their scheduler beside vLLM's own queues."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from torch_elastic_mem.integrations.vllm import line
from torch_elastic_mem.integrations.vllm.ranks import Ranks
from torch_elastic_mem.integrations.vllm.registry import keep
from torch_elastic_mem.integrations.vllm.together import Together, attempt

log = logging.getLogger("vllm.torch_elastic_mem")

# What ranks do together or not at all.
TOGETHER = ("sleep", "wake_up", "discard")


class ElasticExecutor(MultiprocExecutor):
    """vLLM's, over ranks whose KV caches lie on arenas."""

    elastic_door: line.Door | None = None
    elastic_ranks: Ranks | None = None
    elastic_together: Together | None = None

    def _init_executor(self) -> None:
        # No thread is started before the ranks are: they may be forked.
        self.elastic_door = line.Door()
        os.environ[line.PLACE] = str(self.elastic_door.path)
        # Connectors ask how ranks are started, to know whether all of them answer.
        self.parallel_config.distributed_executor_backend = "mp"
        try:
            super()._init_executor()
        except BaseException:
            self.elastic_door.close()
            raise
        finally:
            del os.environ[line.PLACE]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> Any:
        """As vLLM's, while the ranks agree on what comes and goes together."""
        assert self.elastic_door is not None
        ranks = self.elastic_ranks = Ranks(self.world_size)
        meeting = threading.Thread(target=self._meet, args=(ranks, self.elastic_door), name="tem-meet")
        meeting.start()
        try:
            done = super().initialize_from_config(kv_cache_configs)
        finally:
            self.elastic_door.close()
            meeting.join()
        if ranks.elastic:
            keep(self.vllm_config.instance_id, ranks)
        self.elastic_together = Together(ranks, self._attempt)
        return done

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *more: Any,
        **named: Any,
    ) -> Any:
        """As vLLM's, but for sleep and wake-up, which have no timeout."""
        if self.elastic_together is None or method not in TOGETHER:
            return super().collective_rpc(method, timeout, args, kwargs, *more, **named)
        getattr(self.elastic_together, method)(*args, **(kwargs or {}))
        return [None] * self.world_size

    def _attempt(self, method: str, *args: object) -> list[str | None]:
        return list(super().collective_rpc(attempt, args=(method, *args)))

    def shutdown(self) -> None:
        """As vLLM's."""
        super().shutdown()  # type: ignore[no-untyped-call]
        if self.elastic_door is not None:
            self.elastic_door.close()
        if self.elastic_ranks is not None:
            self.elastic_ranks.close()

    @staticmethod
    def _meet(ranks: Ranks, door: line.Door) -> None:
        try:
            ranks.meet(door)
        except (OSError, EOFError):
            # The others wait for an answer; without one each of them fails, and the engine does not start.
            log.warning("not all ranks have come to agree on their memory")
            door.close()
            ranks.close()
