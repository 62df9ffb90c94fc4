"""vLLM's schedulers over a pool of blocks that breathes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from torch_elastic_mem.integrations.vllm import compat, compat_layers
from torch_elastic_mem.integrations.vllm.balloon import Balloon
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.connectors import Copies
from torch_elastic_mem.integrations.vllm.controller import Controller
from torch_elastic_mem.integrations.vllm.demand import Needs
from torch_elastic_mem.integrations.vllm.mover import Mover
from torch_elastic_mem.integrations.vllm.registry import find, forget
from torch_elastic_mem.integrations.vllm.worker import first_blocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as Base
else:
    Base = object

log = logging.getLogger("vllm.torch_elastic_mem")

# Of what the largest step may use, the part that a growth brings beyond it.
MARGIN = 8
# Who waits so holds blocks.
HOLDING = {RequestStatus.WAITING_FOR_REMOTE_KVS, RequestStatus.WAITING_FOR_STREAMING_REQ}


class Elastic(Base):
    """Mixed into a scheduler class of vLLM's, before it.

    Only what changes or reads the block pool is wrapped. The engine's one thread calls all of it.
    """

    _pause_state: PauseState  # vLLM's own

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Where the worker made no elastic cache, and has said why: the class that this is mixed into."""
        config = args[0] if args else kwargs["vllm_config"]
        if find(config.instance_id) is None:
            return cls.__mro__[2](*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cache = find(self.vllm_config.instance_id)
        assert cache is not None  # or it would be another class
        ahead = first_blocks(self.vllm_config, self.kv_cache_config)
        pool, size = self.kv_cache_manager.block_pool, cache.chunk_blocks
        self._copies = Copies(self.connector)
        self._in_order = compat.delivering(self)
        compat.retain_tiles(self)
        self._queues, self._deferred = compat.queues(self), compat.deferred(self)
        specs = compat.specs(self.kv_cache_config)
        self._block_sizes = [spec.block_size for spec in specs]
        self._managers = self.kv_cache_manager.coordinator.single_type_managers
        self._most = [compat_layers.most(manager) for manager in self._managers]
        self._states = sum(map(compat_layers.states, specs))
        self._of_tokens = sum(type(compat.layers(spec)[0]).__name__ != "MambaSpec" for spec in specs)
        balloon = Balloon(
            pool, size, -(-ahead // size), self._copies.blocks, lambda: compat.deferred_blocks(self)
        )
        # It may be asked for memory from here on.
        self.elastic = Controller(cache, balloon, self._preempt_last, self._needs, self._goes_on)
        if isinstance(cache, ElasticCache):
            self.elastic.mover = self._mover(cache)
        self._memory = cache
        self._low = ahead - 1
        self._margin = ahead // MARGIN

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step, after the pool has been given what the step may use and has lost what others want."""
        with self.elastic.lock:
            low = max(self._low, self._first_waiting()) + self._watermark()
            self.elastic.before_step(low, low + self._margin)
            self.kv_cache_manager.watermark_blocks = self._watermark()
            before = self._pause_state
            if before == PauseState.UNPAUSED and self._admits_nobody():
                self._pause_state = PauseState.PAUSED_NEW
            try:
                with self._in_order():
                    output = super().schedule(*args, **kwargs)
            finally:
                self._pause_state = before
            self.elastic.step_scheduled()
            self._copies.step_scheduled()
            self._memory.number(output)
            return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        with self.elastic.lock:
            done = super().update_from_output(*args, **kwargs)
            self.elastic.reconsider()
            return done

    def add_request(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        with self.elastic.lock:
            return super().add_request(*args, **kwargs)

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        with self.elastic.lock:
            done = super().finish_requests(*args, **kwargs)
            self.elastic.reconsider()
            return done

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, which wants every block free: parked ones are, while it looks."""
        with self.elastic.lock:
            balloon = self.elastic.balloon
            parked = balloon.next_out(balloon.parked)
            balloon.unpark(parked)
            try:
                return super().reset_prefix_cache(*args, **kwargs)
            finally:
                balloon.park(parked)

    def reset_connector_cache(self) -> Any:
        """As vLLM's."""
        with self.elastic.lock:
            self._copies.forget()
            return super().reset_connector_cache()

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; a parked block is not in use."""
        with self.elastic.lock:
            stats = super().make_stats(*args, **kwargs)
            if stats is not None:
                stats.kv_cache_usage = self.elastic.usage()
            return stats

    def set_pause_state(self, pause_state: PauseState) -> None:
        """As vLLM's; but while its cache or its model is away, an engine is paused whoever resumes it."""
        if pause_state == PauseState.UNPAUSED and (self.elastic.away or self.elastic.weights_away):
            log.warning("the engine sleeps: it goes on after wake_up(), and not before")
            return
        super().set_pause_state(pause_state)
        self.elastic.reconsider()

    def shutdown(self) -> None:
        """As vLLM's. The workers have been shut down before, and run no step any more."""
        self.elastic.close()
        forget(self.vllm_config.instance_id)
        super().shutdown()

    def _needs(self) -> Needs:
        """Of the next step.

        A few for each request that runs, and for those to be admitted all that their prompts need: vLLM
        admits a request only if the whole of it fits. Where none runs, the first is admitted.

        For sure a request that runs takes, of a group whose blocks are filled by tokens, no more than the new
        tokens would fill alone: its blocks hold all that are computed, and ceil(a + b) <= ceil(a) + ceil(b).
        """
        tokens = self.max_num_scheduled_tokens
        waiting: list[int] = []
        for request in chain.from_iterable(self._to_admit()):
            if tokens <= 0:
                break
            waiting.append(self._blocks_of(request))
            tokens -= request.num_tokens - request.num_computed_tokens
        running = self._running_blocks()
        most = running + sum(waiting) + (self._watermark() if waiting else 0)
        least = running - self._of_tokens * len(self.running)
        return Needs(running, least + (0 if self.running else sum(waiting[:1])), most)

    def _blocks_of(self, request: Any) -> int:
        """Blocks that the whole of a request that waits may take, beside those that it holds.

        One that was fed by its client or loaded for holds some. Of a long one what others hold is taken off,
        as of a preamble that all have: it is found by a look at each block. The last token is computed in any
        case.
        """
        tokens = request.num_tokens + self.num_lookahead_tokens
        blocks = self._states + sum(
            min(-(-tokens // size), most) + 1
            for size, most in zip(self._block_sizes, self._most, strict=True)
        )
        if request.num_computed_tokens > 0:
            return max(0, blocks - self._held_by(request))
        if blocks <= self._low or len(self._block_sizes) > 1 or request.skip_reading_prefix_cache:
            return blocks
        shared = self.elastic.balloon.held_prefix(request.block_hashes)
        return blocks - min(shared, (request.num_tokens - 1) // self._block_sizes[0])

    def _held_by(self, request: Any) -> int:
        held = (manager.req_to_blocks.get(request.request_id, ()) for manager in self._managers)
        return sum(not block.is_null for blocks in held for block in blocks)

    def _first_waiting(self) -> int:
        """Blocks of who is to be admitted next: a prompt may be longer than what a step computes.

        Which queue is first differs between releases, and with what is guided; those that are put off may
        stand before who is not.
        """
        most = 0
        for queue in self._queues:
            put_off = False
            for request in queue:
                if request.status in HOLDING or (put_off and request in self._deferred):
                    continue
                most = max(most, self._blocks_of(request))
                if request not in self._deferred:
                    break
                put_off = True
        return most

    def _to_admit(self) -> list[Iterator[Any]]:
        """Who waits for blocks, by queue: those that load, or wait for their client, have theirs."""
        return [(each for each in queue if each.status not in HOLDING) for queue in self._queues]

    def _watermark(self) -> int:
        """Blocks that vLLM keeps free when it admits somebody beside others: a part of those with memory."""
        if not (part := self.scheduler_config.watermark):
            return 0
        return int(part * (self.kv_cache_config.num_blocks - self.elastic.balloon.parked_blocks))

    def _running_blocks(self) -> int:
        """Blocks that running requests may take in the next step, and one each for a later one."""
        lookahead = 1 + self.num_spec_tokens + self.num_lookahead_tokens
        running = sum(1 + -(-lookahead // size) for size in self._block_sizes) * len(self.running)
        left = [request.num_tokens - request.num_computed_tokens for request in self._inflight_prefills]
        budget = self.max_num_scheduled_tokens
        prefills = sum(
            min(sum(-(-tokens // size) for tokens in left), -(-budget // size) + len(left))
            for size in self._block_sizes
        )
        return running + prefills

    def _admits_nobody(self) -> bool:
        """While the engine drains, and in the step after requests were preempted.

        vLLM itself admits nobody in a step that preempts, and its connectors count on that: a request whose
        preemption they hear of in a step asks for no load in it.
        """
        return self.elastic.draining or bool(self.reset_preempted_req_ids)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self._copies.preempted(request.request_id)

    def _mover(self, cache: ElasticCache) -> Mover | None:
        if reason := compat.unmovable(self):
            log.info("sparse chunks of this engine's KV cache are not compacted: %s", reason)
            return None
        return Mover(
            cache,
            self.elastic.balloon,
            lambda blocks: compat.tables_with(self, blocks),
            self._goes_on,
        )

    def _goes_on(self) -> bool:
        """Whether requests run, and steps of theirs are to come."""
        return bool(self.running) and self.pause_state != PauseState.PAUSED_ALL

    def _preempt_last(self) -> bool:
        """Preempts the request that vLLM itself would."""
        if not self.running:
            return False
        victim = (
            max(self.running, key=lambda request: (request.priority, request.arrival_time))
            if self.policy.value == "priority"
            else self.running[-1]
        )
        compat.preempt(self, victim)
        return True


class ElasticScheduler(Elastic, Scheduler):
    """vLLM's scheduler with an elastic pool."""


class ElasticAsyncScheduler(Elastic, AsyncScheduler):
    """vLLM's asynchronous scheduler with an elastic pool."""
