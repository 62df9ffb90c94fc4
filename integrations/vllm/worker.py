"""What both of our workers do beside vLLM's own: its KV cache lies on an arena."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch_elastic_mem.account import Group
from torch_elastic_mem.broker.paths import tenants_socket
from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.integrations.vllm import compat, compat_layers, connectors, line
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.rank import Rank
from torch_elastic_mem.integrations.vllm.registry import arena_of, keep, open_account
from torch_elastic_mem.integrations.vllm.sleep import Sleep
from torch_elastic_mem.torch_cuda import account_of_torch
from torch_elastic_mem.units import format_bytes

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as Base

    from torch_elastic_mem.account import Account
    from torch_elastic_mem.arena import Arena
else:
    Base = object

log = logging.getLogger("vllm.torch_elastic_mem")


class Elastic(Base):
    """Mixed into a worker class of vLLM's, before it."""

    elastic_arena: Arena
    elastic_account: Account
    elastic_cache: ElasticCache | None = None
    elastic_sleep: Sleep | None = None
    elastic_rank: Rank | None = None
    sized_by_account = False  # rather than by a share of the device

    def open_elastic_account(self, nbytes: int | None) -> Arena:
        """Opens the account that the KV cache is charged to, and in sleep mode the weights.

        Args:
            nbytes: the most that the cache may come to, where that is known.
        """
        if self.elastic_sleep is None:
            assert self.device is not None  # vLLM has initialised it
            self.elastic_arena = arena_of(self.device, nbytes)
            self.elastic_account = open_account(self.elastic_arena)
            if self.elastic_arena.broker is None and tenants_socket(os.environ) is not None:
                log.info(
                    "no broker runs: this engine shares its device with no other process; start it by "
                    "`tem run`, or `tem serve` before it"
                )
        return self.elastic_arena

    def within_its_limit(self, room: int, held: int) -> int:
        """What of some room the account's `max` leaves the cache, beside what else the account holds.

        Raises:
            InvalidArgument: nothing.
        """
        limit = self.elastic_account.limits.max
        if limit is None:
            return room
        if limit <= held:
            raise InvalidArgument(
                f"the account's max is {format_bytes(limit)}, and the engine's weights and activations take "
                f"{format_bytes(held)} of it: nothing is left for a KV cache; raise it (TEM_MAX, tem limit)"
            )
        return min(room, limit - held)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        """Where vLLM allocates what sleeps."""
        if not self.vllm_config.model_config.enable_sleep_mode:
            return super()._maybe_get_memory_pool_context(tag)
        if self.elastic_sleep is None:
            self.open_elastic_account(None)
            self.elastic_sleep = Sleep(self.elastic_arena, self.elastic_account)
            self._sleep_mode_backend = self.elastic_sleep
            if self._graphs_can_sleep():
                self.elastic_sleep.keep_graphs()
        return self.elastic_sleep.allocations(tag)

    def _graphs_can_sleep(self) -> bool:
        """Torch's memory is an account's, and nobody has been given parts of it, as NCCL is among ranks."""
        if self.elastic_arena.device == "cpu" or self.vllm_config.parallel_config.world_size > 1:
            return False
        return account_of_torch(self.elastic_arena.device) is not None

    def capturing(self) -> AbstractContextManager[None]:
        """Within the block CUDA graphs are captured, or what captures them is made."""
        return nullcontext() if self.elastic_sleep is None else self.elastic_sleep.capturing()

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Makes the KV cache, with memory under as many blocks as one step may use."""
        ranks = self.vllm_config.parallel_config.world_size > 1
        cache = self._among_ranks(kv_cache_config) if ranks else self._new_cache(kv_cache_config)
        if cache is None:
            super().initialize_from_config(kv_cache_config)
            return
        cache.use_stream()
        # The warm-up that follows runs a step of full size over the first blocks, and graphs are captured
        # over block 0.
        cache.ensure(range(-(-first_blocks(self.vllm_config, kv_cache_config) // cache.chunk_blocks)))
        with cache.handed_out(), connectors.laid_out_as_configured(self.model_runner), self.capturing():
            super().initialize_from_config(kv_cache_config)
        cache.on_moved = lambda tables: compat.write_tables(self.model_runner, tables)
        self.elastic_cache = cache
        if self.elastic_sleep is not None:
            self.elastic_sleep.cache = cache
        keep(self.vllm_config.instance_id, cache)
        log.info(
            "KV cache of %d blocks on %r: %d chunks of %d MiB, %s",
            cache.num_blocks,
            cache.account,
            cache.num_chunks,
            cache.chunk_bytes >> 20,
            "block after block" if cache.whole_blocks else "layer after layer",
        )

    def keeps_what_is_known(self) -> bool:
        """Whether its cache can be elastic, as far as its layers say: else vLLM sizes it as ever.

        Raises:
            Unsupported: it cannot, and is to sleep.
        """
        specs = list(self.get_kv_cache_spec().values())
        try:
            compat_layers.require_known_layers(specs)
            # Without its manager of hybrid caches vLLM is about to make one kind of all.
            if not self.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
                connectors.require_whole_layers(self.vllm_config.kv_transfer_config, specs)
        except compat.Unsupported as reason:
            self._leave_alone(reason)
            return False
        return True

    def _leave_alone(self, reason: compat.Unsupported) -> None:
        if self.elastic_sleep is not None:
            # What vLLM takes for its cache by itself would be saved with the runner's state, or stay.
            raise compat.Unsupported(f"{reason}; such a cache does not sleep on the arena: start it without")
        log.warning("torch_elastic_mem leaves this engine's KV cache alone: %s", reason)

    def _new_cache(self, kv_cache_config: Any) -> ElasticCache | None:
        """The cache, without memory; None if it cannot be elastic."""
        specs = compat.specs(kv_cache_config)
        try:
            compat_layers.require_known_layers(specs)
            compat_layers.require_on_device(kv_cache_config)
            connectors.require_whole_layers(self.vllm_config.kv_transfer_config, specs)
            compat.make_block_major(kv_cache_config)
            regions = compat.regions(kv_cache_config)
        except compat.Unsupported as reason:
            self._leave_alone(reason)
            if self.sized_by_account:
                log.warning(
                    "that cache has the size of one that shares its device: give it another by "
                    "--kv-cache-memory-bytes, or start the engine without TEM_ENABLE=1"
                )
            return None
        aside = self.vllm_config.kv_transfer_config is not None
        return ElasticCache(self.elastic_account, kv_cache_config.num_blocks, regions, aside=aside)

    def _among_ranks(self, kv_cache_config: Any) -> ElasticCache | None:
        """The same, its chunks those of all ranks; None if one of them cannot be elastic."""
        caller = line.call(os.environ[line.PLACE])
        try:
            cache = self._new_cache(kv_cache_config)
            hello = line.Hello(self.rank, 0, 0, False)
            if cache is not None:
                hello = line.Hello(self.rank, cache.num_blocks, cache.chunk_blocks, cache.all_apart)
            caller.send(hello)
            welcome = caller.receive()
        except BaseException:
            caller.close()  # or the other ranks wait for this one's answer
            raise
        assert isinstance(welcome, line.Welcome)
        if cache is None or welcome.chunk_blocks == 0:
            caller.close()
            return None
        cache.set_chunks(welcome.chunk_blocks)
        broker = self.elastic_arena.broker
        group = None if broker is None else Group(welcome.group, welcome.members)
        self.elastic_rank = Rank(cache, caller, group)
        return cache

    def sleep(self, level: int = 1) -> None:
        """As vLLM's. One of several ranks is asked again where another did not wake up."""
        if self.elastic_sleep is not None and self.elastic_sleep.weights.away:
            # vLLM would save buffers of the model that have no memory.
            self.elastic_sleep.suspend(level)
        else:
            self._fall_asleep(level)

    def _fall_asleep(self, level: int) -> None:
        super().sleep(level)

    def cool_down_elastic_account(self) -> None:
        """What is idle goes, for the engine sleeps on."""
        if self.elastic_sleep is not None:
            self.elastic_sleep.cool_down()

    def execute_model(self, scheduler_output: Any) -> Any:
        """As vLLM's. Without an output yet, sampling follows, which may run a draft model over the cache."""
        if self.elastic_rank is not None:
            number = getattr(scheduler_output, "elastic_step", None)
            if number is not None:  # a step of the warm-up has none
                self.elastic_rank.step_begins(number)
        try:
            output = super().execute_model(scheduler_output)
        except BaseException:
            # No more of it comes. Who drives an engine in its own process may go on.
            self._step_enqueued()
            raise
        if output is not None:
            self._step_enqueued()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM's; the end of a step's work."""
        try:
            return super().sample_tokens(grammar_output)
        finally:
            self._step_enqueued()

    def _step_enqueued(self) -> None:
        if self.elastic_cache is not None:
            self.elastic_cache.on_enqueued()

    def shutdown(self) -> None:
        """As vLLM's."""
        super().shutdown()
        if self.elastic_rank is not None:
            self.elastic_rank.close()
        if self.elastic_cache is not None:
            # Who has a view of the cache has not the model too.
            self.elastic_cache.on_moved = lambda _: None
        if self.elastic_sleep is not None:
            self.elastic_sleep.close()

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """The layouts that the attention backends take, those first whose blocks lie whole.

        A backend of latents that names none may flatten its cache all the same: their order is vLLM's.
        """
        found = super().get_supported_kv_cache_layouts()
        return found if self.vllm_config.model_config.use_mla else compat.prefer_block_major(found)


def first_blocks(vllm_config: Any, kv_cache_config: Any) -> int:
    """Blocks that a step of the largest size may use, with the null block; at most all.

    vLLM's warm-up uses as many, with as many requests as there may be: each has a prompt that is a token
    longer than a step that verifies drafts, then one such step, and room for the next drafts.
    """
    scheduling, speculating = vllm_config.scheduler_config, vllm_config.speculative_config
    drafts = 0 if speculating is None else speculating.num_speculative_tokens
    tokens, each_tokens = scheduling.max_num_batched_tokens, 4 + 3 * drafts
    needed = 1
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        each = -(-each_tokens // spec.block_size) + compat_layers.states(spec)
        needed += -(-tokens // spec.block_size) + each * scheduling.max_num_seqs
    return min(needed, kv_cache_config.num_blocks)
