"""KV connectors: which are served, and which blocks one of them reads though nobody holds them.

Facts, each read in the wheels of the releases that `compat` knows:

* `ExampleConnector` copies within a step. `SimpleCPUOffloadConnector` copies on streams of its own, and holds
  a reference to a block until the copy has ended.
* `OffloadingConnector` holds none. It knows a copy by a job, from the step whose schedule makes it until the
  step in whose output all workers have said that it is done; the copy itself begins a step after its job. A
  request's last blocks get their job in the step after the request has ended and freed them. Till then it
  keeps the request's blocks by number. While there is a job, the engine is stepped though it has no requests.
* Told to forget what it keeps, it forgets its jobs too, and waits for their copies in the next step.
* A job has its blocks in two lists: those that a sliding window may leave while the request runs, and the
  others. A block that has left the window may get its job later still, without a reference and, in the
  request's list, under a number that may have been another's since. So may a request that ends although it
  was preempted, by what was in flight; where the list has 0 nothing is copied.
* `MultiConnector` is several. Up to 0.28 a V1 runner whose connector prefers one tensor for all layers
  allocates that, whatever the configuration of the cache says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch_elastic_mem.integrations.vllm.compat import Unsupported, layers

# Those that touch a block only while it is held: within a step, or by a reference of their own.
HOLDING = {"ExampleConnector", "SimpleCPUOffloadConnector"}
# Those whose copies are known here by their jobs.
COPYING = {"OffloadingConnector"}
SERVED = HOLDING | COPYING
# What `OffloadingConnector` may copy to. One of somebody's own may register all of the cache.
SPECS = {"CPUOffloadingSpec", "TieringOffloadingSpec"}
# Layers whose blocks a request holds until it ends. Of others a copy may be made after that.
WHOLE = {"FullAttentionSpec", "MLAAttentionSpec"}
# Where a job has the blocks it reads: up to 0.28, and later.
JOB_BLOCKS = (
    "non_sliding_window_block_ids",
    "sliding_window_block_ids",
    "deferred_fence_block_ids",
    "fenced_block_ids",
)


def other_connector(transfer: Any, sleeps: bool = False) -> str | None:
    """Why an engine with this `--kv-transfer-config` is not served, or None where it is or has none."""
    if transfer is None or transfer.kv_connector is None:
        return None
    for name, path, extra in _configured(transfer):
        if name not in SERVED or path is not None:
            return (
                f"{name} may register or read all of the KV cache, and not all of it has memory; "
                f"served are {', '.join(sorted(SERVED))}, and several of them by MultiConnector"
            )
        if name in COPYING and sleeps:
            return f"{name} copies blocks that an engine which falls asleep has given up"
        if name in COPYING and (spec := extra.get("spec_name", "CPUOffloadingSpec")) not in SPECS:
            return f"{spec} may register all of the KV cache, and not all of it has memory"
    return None


def _configured(transfer: Any) -> Iterator[tuple[str, str | None, Mapping[str, Any]]]:
    """The connectors that a configuration names: class, module of one's own, and options."""
    extra = transfer.kv_connector_extra_config or {}
    if transfer.kv_connector != "MultiConnector" or transfer.kv_connector_module_path is not None:
        yield transfer.kv_connector, transfer.kv_connector_module_path, extra
        return
    for each in extra.get("connectors", ()):
        options = each.get("kv_connector_extra_config") or {}
        yield each.get("kv_connector", ""), each.get("kv_connector_module_path"), options


def require_whole_layers(transfer: Any, specs: Iterable[Any]) -> None:
    """Refuses layers whose blocks a configured connector may copy after their request has left them.

    Args:
        transfer: the engine's `--kv-transfer-config`.
        specs: what each layer, or each group of them, keeps.

    Raises:
        Unsupported: there are some.
    """
    if transfer is None or transfer.kv_connector is None:
        return
    copying = sorted({name for name, _, _ in _configured(transfer)} & COPYING)
    kinds = {type(layer).__name__ for spec in specs for layer in layers(spec)}
    if copying and (others := sorted(kinds - WHOLE)):
        raise Unsupported(
            f"{copying[0]} copies blocks of {', '.join(others)} that have left the window, and their memory "
            "may have gone; VLLM_USE_SIMPLE_KV_OFFLOAD=1 has vLLM offload by one that holds what it copies"
        )


@contextmanager
def laid_out_as_configured(runner: Any) -> Iterator[None]:
    """Within the block a runner allocates the cache by its configuration, whatever a connector prefers."""
    if not hasattr(runner, "use_uniform_kv_cache"):
        yield
        return
    runner.use_uniform_kv_cache = lambda *_: False
    try:
        yield
    finally:
        del runner.use_uniform_kv_cache


class Copies:
    """The blocks that the connector of a scheduler reads or is yet to read though nobody need hold them.

    Not thread-safe: the controller's lock guards it, and all calls of the connector.
    """

    def __init__(self, connector: Any) -> None:
        several = getattr(connector, "_connectors", [connector])
        self._schedulers = [each.connector_scheduler for each in several if type(each).__name__ in COPYING]
        self._forgotten: set[int] = set()

    def blocks(self) -> set[int]:
        """Their numbers."""
        found = set(self._forgotten)
        for scheduler in self._schedulers:
            for job in scheduler._jobs.values():
                if job.is_store:
                    for name in JOB_BLOCKS:
                        found.update(getattr(job, name, None) or ())
            for request in scheduler._req_status.values():
                if request.req.is_finished():
                    found.update(number for group in request.group_states for number in group.block_ids)
        return found

    def preempted(self, request_id: str) -> None:
        """A request's blocks are others' now: if it ends before it is resumed, none is to be copied."""
        for scheduler in self._schedulers:
            if (request := scheduler._req_status.get(request_id)) is not None:
                for group in request.group_states:
                    group.block_ids[:] = [0] * len(group.block_ids)

    def forget(self) -> None:
        """The connector is about to forget what it keeps; its workers copy on until the next step."""
        self._forgotten = self.blocks()

    def step_scheduled(self) -> None:
        """What it had forgotten is waited for in this step."""
        self._forgotten.clear()
