"""What vLLM's entry point calls, in each of its processes."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch_elastic_mem.activate import settings
from torch_elastic_mem.activate.settings import ENABLE
from torch_elastic_mem.integrations.vllm import compat, compat_sleep, connectors, variables

log = logging.getLogger("vllm.torch_elastic_mem")
HERE = "torch_elastic_mem.integrations.vllm"
# vLLM's own worker, and the one that takes its place.
WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": f"{HERE}.gpu_worker.ElasticWorker",
    "vllm.v1.worker.cpu_worker.CPUWorker": f"{HERE}.cpu_worker.ElasticCPUWorker",
}


def register() -> None:
    """Has engines that are configured from now on use elastic memory, if TEM_ENABLE=1 asks for it.

    Never raises: where it cannot be, vLLM runs as if this package were not there, and a warning says why. But
    a variable that says what cannot be is an error of the engine's configuration.
    """
    if (given := os.environ.get(ENABLE, "")) != "1":
        if given not in ("", "0"):
            log.warning("torch_elastic_mem leaves this engine alone: %s is %r, not 1", ENABLE, given)
        return
    try:
        compat.require_known()
        from vllm.engine.arg_utils import EngineArgs
    except Exception as reason:  # noqa: BLE001  (an error here would end every vLLM on the machine)
        log.warning("torch_elastic_mem leaves this engine alone: %s", reason)
        return
    plain = EngineArgs.create_engine_config
    if getattr(plain, "elastic", False):
        return

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = plain(self, *args, **kwargs)
        try:
            choose_classes(config)
        except Exception as reason:  # noqa: BLE001  (a field that is called otherwise there, say)
            log.warning("torch_elastic_mem leaves this engine alone: %s", reason)
        else:
            variables.check(os.environ)
            for said in settings.misspelt(os.environ):
                log.warning("torch_elastic_mem: %s", said)
        return config

    create_engine_config.elastic = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def choose_classes(config: Any) -> None:
    """Puts our worker and scheduler where vLLM has chosen its own.

    Raises:
        Unsupported: the engine is configured in a way that is not served; nothing was changed.
    """
    parallel, scheduling = config.parallel_config, config.scheduler_config
    ranks = parallel.world_size > 1
    if reason := compat.other_ranks(parallel):
        raise compat.Unsupported(reason)
    worker = WORKERS.get(parallel.worker_cls)
    if worker is None:
        raise compat.Unsupported(f"it has a worker class of its own, {parallel.worker_cls}")
    if scheduling.scheduler_cls is not None:
        raise compat.Unsupported(f"it has a scheduler class of its own, {scheduling.scheduler_cls}")
    sleeps = config.model_config.enable_sleep_mode
    if sleeps and (reason := compat_sleep.other_sleep(config.model_config)):
        raise compat.Unsupported(reason)
    if reason := connectors.other_connector(config.kv_transfer_config, sleeps):
        raise compat.Unsupported(reason)
    if reason := compat.other_drafts(config.speculative_config):
        raise compat.Unsupported(reason)
    if config.load_config.load_format == "ipc_cache":
        raise compat.Unsupported("its weights may be another process's memory, which is in no account here")
    if config.model_config.runner_type == "pooling":
        raise compat.Unsupported("a pooling model keeps no KV cache")
    # The CPU engine puts even a single worker in a process of its own; ours shares one with the scheduler.
    if parallel.distributed_executor_backend not in (("mp",) if ranks else ("uni", "mp", None)):
        raise compat.Unsupported(f"its workers are started by {parallel.distributed_executor_backend}")
    parallel.distributed_executor_backend = f"{HERE}.executor.ElasticExecutor" if ranks else "uni"
    parallel.worker_cls = worker
    scheduling.scheduler_cls = (
        f"{HERE}.scheduler.{'ElasticAsyncScheduler' if scheduling.async_scheduling else 'ElasticScheduler'}"
    )
