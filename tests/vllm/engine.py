"""The real engine: `python -m tests.vllm.engine SCENARIO SHAPE`. Prints a line of JSON a fact."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.vllm import shapes
from tests.vllm import weights
from tests.vllm.pressing import Pressing

MiB = 1 << 20
CACHE = 64 * MiB
BLOCK = 32

# What vLLM prints, by print and by its logger, must not come between the facts.
FACTS = os.fdopen(os.dup(1), "w")


def fact(name: str, value: object) -> None:
    FACTS.write(json.dumps({"fact": name, "value": value}) + "\n")
    FACTS.flush()


def engine(folder: Path, shape: str, **more: Any) -> Any:
    from vllm import LLM

    weights.draw()
    arguments: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": CACHE,
        # Of no use to an engine whose cache is given, but each wants so much of the device free.
        "gpu_memory_utilization": 0.1,
        "block_size": BLOCK,
        "enforce_eager": True,
        "disable_log_stats": False,
        "seed": 0,
    }
    return LLM(model=str(shapes.write(shape, folder)), **arguments | more)


def prompts(seed: int, count: int) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    return [
        {"prompt_token_ids": [rng.randrange(3, 1000) for _ in range(rng.randrange(20, 400))]}
        for _ in range(count)
    ]


def sampling(count: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)


def tokens(llm: Any, seed: int, count: int = 80) -> list[list[int]]:
    out = llm.generate(prompts(seed, count), sampling(48), use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in out]


def plain(llm: Any) -> None:
    fact("scheduler", type(llm.llm_engine.engine_core.engine_core.scheduler).__name__)
    fact("tokens", [tokens(llm, 1), tokens(llm, 2, 40)])


def squeezed(llm: Any) -> None:
    core = llm.llm_engine.engine_core.engine_core
    scheduler, worker = core.scheduler, core.model_executor.driver_worker.worker
    cache = worker.elastic_cache
    fact("scheduler", type(scheduler).__name__)
    fact("resident at first", cache.resident_bytes)
    with Pressing(worker) as other:
        first = tokens(llm, 1)
    fact("demands", other.met)
    fact("least", other.least)
    fact("usage when idle", scheduler.make_stats().kv_cache_usage)
    fact("kept when nobody asks", cache.resident_bytes)
    other.range.grow(other.arena.capacity - cache.chunk_bytes, timeout=5.0)
    fact("kept when somebody asks", [cache.resident_bytes, cache.chunk_bytes])
    fact("reset", llm.reset_prefix_cache())
    abort(llm)
    other.range.shrink(other.range.mapped)
    fact("tokens", [first, tokens(llm, 2, 40)])
    fact("grown again", cache.resident_bytes)
    limited(llm, cache)


def abort(llm: Any) -> None:
    """Requests that are aborted while they wait for memory that is not to be had."""
    names = [f"gone-{number}" for number in range(12)]
    for name, prompt in zip(names, prompts(4, len(names)), strict=True):
        llm.llm_engine.add_request(name, prompt, sampling(200))
    for _ in range(5):
        llm.llm_engine.step()
    llm.llm_engine.abort_request(names)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    balloon = llm.llm_engine.engine_core.engine_core.scheduler.elastic.balloon
    fact("in use after aborts", balloon.in_use())


def limited(llm: Any, cache: Any) -> None:
    """A limit far below what running requests hold, and below one request, for a while."""
    llm.reset_prefix_cache()
    for number, prompt in enumerate(prompts(5, 16)):
        llm.llm_engine.add_request(str(number), prompt, sampling(64))
    for _ in range(6):
        llm.llm_engine.step()
    limit = {"max": cache.chunk_bytes, "timeout": 5.0}
    setting = threading.Thread(target=cache.account.set_limits, kwargs=limit)
    setting.start()
    came = 0
    while setting.is_alive():
        came += sum(each.finished for each in llm.llm_engine.step())
    for _ in range(20):
        came += sum(each.finished for each in llm.llm_engine.step())
    fact("over the limit", max(0, cache.resident_bytes - cache.chunk_bytes))
    fact("came under it", came)
    cache.account.set_limits(max="max")
    while llm.llm_engine.has_unfinished_requests():
        came += sum(each.finished for each in llm.llm_engine.step())
    fact("came in the end", came)


def watermarked(llm: Any) -> None:
    """A half of all blocks is to be kept free beside whom vLLM admits."""
    for number, prompt in enumerate(prompts(6, 8)):
        llm.llm_engine.add_request(str(number), prompt, sampling(24))
    running = [0]
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        running.append(len(llm.llm_engine.engine_core.engine_core.scheduler.running))
    fact("ran at once", max(running))


def few(llm: Any, meanwhile: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Fourteen requests of which the last end first, after some steps three more; the tokens of all."""
    found: dict[str, list[int]] = {}
    asked = prompts(6, 17)
    for number, prompt in enumerate(asked[:14]):
        llm.llm_engine.add_request(str(number), prompt, sampling(64 - 4 * number))
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        if step == 8:
            meanwhile()
            for number, prompt in enumerate(asked[14:], 14):
                llm.llm_engine.add_request(str(number), prompt, sampling(48))
        for output in llm.llm_engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return [found[str(number)] for number in range(len(asked))]


def plain_few(llm: Any) -> None:
    fact("tokens", few(llm))


def drained(llm: Any) -> None:
    """Somebody asks a busy engine for what comes free as requests end: for more than there is."""
    core = llm.llm_engine.engine_core.engine_core
    scheduler, cache = core.scheduler, core.model_executor.driver_worker.worker.elastic_cache
    schedule, preempt = scheduler.schedule, scheduler._preempt_request
    told: dict[str, list[Any]] = {"admitted": [], "running": [], "resident": [], "preempted": []}

    def seen(*args: Any) -> Any:
        output = schedule(*args)
        if scheduler.elastic.draining:
            told["admitted"] += [each.req_id for each in output.scheduled_new_reqs]
            told["running"].append(len(scheduler.running))
            told["resident"].append(cache.resident_bytes)
        return output

    def seen_preempted(request: Any, *args: Any, **more: Any) -> Any:
        told["preempted"].append(request.request_id)
        return preempt(request, *args, **more)

    scheduler.schedule, scheduler._preempt_request = seen, seen_preempted
    fact("tokens", few(llm, lambda: scheduler.elastic._asked("shrink", CACHE, 600.0)))
    fact("drained", told)


def ended(llm: Any) -> None:
    """The engine is shut down, its process lives on, and somebody still has a view of its cache."""
    from torch_elastic_mem.integrations.vllm.registry import find

    core = llm.llm_engine.engine_core.engine_core
    cache = core.scheduler.elastic._cache
    first = tokens(llm, 1, 4)
    fact("held before", cache.account.held)
    llm.llm_engine.engine_core.shutdown()
    fact("held after", cache.account.held)
    fact("found", find(core.vllm_config.instance_id) is not None)
    with tempfile.TemporaryDirectory() as folder:
        again = engine(Path(folder), "tiny")
        scheduler = again.llm_engine.engine_core.engine_core.scheduler
        fact("accounts", [cache.account.name, scheduler.elastic._cache.account.name])
        fact("tokens", [first, tokens(again, 1, 4)])
        again.llm_engine.engine_core.shutdown()
    # One that lives as long as the process.
    sys.view = cache._parts[0][0].tensors[0][:1]  # type: ignore[attr-defined]


def sleeping(llm: Any) -> None:
    """Both levels, partial wakes, and somebody who has the memory when it is to wake up."""
    import torch_elastic_mem as tem
    from torch_elastic_mem.integrations.vllm import sleep as module

    core = llm.llm_engine.engine_core.engine_core
    worker, scheduler = core.model_executor.driver_worker.worker, core.scheduler
    arena, account, sleep = worker.elastic_arena, worker.elastic_account, worker.elastic_sleep
    addresses = [each.data_ptr() for each in worker.model_runner.get_model().parameters()]
    told: dict[str, Any] = {"tokens": [tokens(llm, 1, 8)], "weights": sleep.bytes}
    told["runtime"] = sleep.runtime.bytes
    told["model"] = sum(each.nbytes for each in worker.model_runner.get_model().parameters())
    # The host backend takes what is taken of it.
    arena.set_reserve(0, 0)
    arena.set_capacity(account.held + 32 * MiB)
    llm.sleep(level=1)
    told["asleep"] = account.held
    with arena.account("neighbour", tem.PriorityClass("pressing", 10**6)) as other:
        memory = other.range(arena.capacity)
        memory.grow(arena.capacity, timeout=1.0)
        told["demands of a sleeper"] = [each.given for each in arena.yields() if each.victim == "vllm"]
        module.WAKE = 0.05
        try:
            llm.wake_up()
        except tem.OutOfMemory as error:
            told["refusal"] = str(error)
        told["after a refusal"] = [account.held, llm.llm_engine.is_sleeping()]
        memory.close()
        arena.collect()
    core.resume_scheduler()
    told["resumed while asleep"] = [scheduler.pause_state.name]
    llm.wake_up(tags=["weights"])
    told["with weights"] = [account.held, llm.llm_engine.is_sleeping()]
    llm.wake_up(tags=["kv_cache"])
    told["with all"] = [account.held, llm.llm_engine.is_sleeping()]
    told["chunk"] = worker.elastic_cache.chunk_bytes
    told["tokens"].append(tokens(llm, 1, 8))
    if hasattr(llm, "release_kv_cache_memory"):
        llm.llm_engine.step()  # tells the worker which requests have ended
        llm.sleep(level=0)
        llm.release_kv_cache_memory()
        told["without its cache"] = [account.held, llm.llm_engine.is_sleeping()]
        llm.wake_up(tags=["kv_cache"])
        told["tokens"].append(tokens(llm, 1, 8))
    state = {name: each.clone() for name, each in worker.model_runner.get_model().named_parameters()}
    buffers = {name: each.clone() for name, each in worker.model_runner.get_model().named_buffers()}
    llm.sleep(level=2)
    told["asleep at level 2"] = [account.held, len(sleep.weights._saved)]
    llm.wake_up(tags=["kv_cache"])
    core.resume_scheduler()
    told["resumed while asleep"].append(scheduler.pause_state.name)
    llm.wake_up(tags=["weights"])
    for name, each in worker.model_runner.get_model().named_parameters():
        each.data.copy_(state[name])
    told["buffers"] = all(
        buffers[name].equal(each) for name, each in worker.model_runner.get_model().named_buffers()
    )
    told["tokens"].append(tokens(llm, 1, 8))
    told["addresses stay"] = addresses == [
        each.data_ptr() for each in worker.model_runner.get_model().parameters()
    ]
    for name, value in told.items():
        fact(name, value)
    llm.llm_engine.engine_core.shutdown()


def sleeping_graphs(llm: Any) -> None:
    """Under torch's memory of ours, what graphs work in sleeps too; somebody else has had it meanwhile."""
    import torch
    from vllm.platforms import current_platform

    import torch_elastic_mem as tem

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    sleep, account, arena = worker.elastic_sleep, worker.elastic_account, worker.elastic_arena
    parameters = list(worker.model_runner.get_model().parameters())
    told: dict[str, Any] = {"graphs": sleep.graphs.bytes, "weights": sleep.weights.bytes}
    told["the next engine's too"] = type(current_platform)._global_graph_pool == sleep._pool
    told["tokens"] = [tokens(llm, 1, 8)]
    for level in (1, 2):
        state = [each.cpu() for each in parameters] if level == 2 else []
        awake = account.held
        llm.sleep(level=level)
        told[f"level {level}"] = [sleep.graphs.resident_bytes, awake - account.held]
        with arena.account("neighbour", tem.PriorityClass("pressing", 10**6)) as other:
            memory = other.range(awake)
            memory.grow(awake)
            memory.close()
            torch.cuda.synchronize()
        llm.wake_up()
        for each, was in zip(parameters, state, strict=False):
            each.data.copy_(was)
        told["tokens"].append(tokens(llm, 1, 8))
    for name, value in told.items():
        fact(name, value)
    llm.llm_engine.engine_core.shutdown()


def apart(llm: Any) -> None:
    """The engine in a process of its own; a line on stdin says when to go on."""
    fact("tokens", [tokens(llm, 1), None])
    sys.stdin.readline()
    fact("tokens again", tokens(llm, 2, 40))
    llm.llm_engine.engine_core.shutdown()


def sleeping_amid(llm: Any) -> None:
    """Requests run when it falls asleep, and others come while it sleeps."""
    core = llm.llm_engine.engine_core.engine_core
    account = core.model_executor.driver_worker.worker.elastic_account
    alone = tokens(llm, 1, 4)
    llm.reset_prefix_cache()
    for number, prompt in enumerate(prompts(1, 4)):
        llm.llm_engine.add_request(str(number), prompt, sampling(48))
    for _ in range(10):
        llm.llm_engine.step()
    llm.sleep(level=1, mode="keep")
    llm.llm_engine.add_request("late", prompts(2, 1)[0], sampling(8))
    for _ in range(5):
        llm.llm_engine.step()
    fact("asleep", account.held)
    llm.wake_up()
    came: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        for each in llm.llm_engine.step():
            if each.finished:
                came[each.request_id] = list(each.outputs[0].token_ids)
    fact("late", len(came.pop("late")))
    fact("tokens", [alone, [came[name] for name in sorted(came)]])
    llm.llm_engine.engine_core.shutdown()


def sleeping_apart(llm: Any) -> None:
    """The same where the engine's core is a process of its own; lines on stdin say when to go on."""
    first = tokens(llm, 1, 8)
    fact("awake", None)
    sys.stdin.readline()
    llm.sleep(level=1)
    fact("asleep", None)
    sys.stdin.readline()
    try:
        llm.wake_up()
        fact("refused", None)
    except Exception as error:  # noqa: BLE001  (as vLLM passes it on)
        fact("refused", str(error))
    fact("still asleep", llm.llm_engine.is_sleeping())
    sys.stdin.readline()
    llm.wake_up()
    fact("tokens", [first, tokens(llm, 1, 8)])
    llm.llm_engine.engine_core.shutdown()


def may_sleep() -> bool:
    """Has vLLM take `enable_sleep_mode` on the CPU, where it has no allocator of its own for it."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.is_sleep_mode_available = lambda _: True  # type: ignore[method-assign]
    weights.leave_unpacked()
    return True


def main() -> None:
    scenario, shape = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if scenario.endswith("apart") else "0"
    os.environ["TEM_ENABLE"] = "0" if scenario.startswith("plain") else "1"
    os.dup2(2, 1)
    weights.draw_in_children()
    with tempfile.TemporaryDirectory() as folder:
        asynchronous = scenario in ("squeezed", "sleeping_amid")
        more: dict[str, Any] = {"async_scheduling": True} if asynchronous else {}
        if scenario.startswith("sleeping"):
            more["enable_sleep_mode"] = may_sleep()
        more |= {"watermark": 0.5} if scenario == "watermarked" else {}
        if scenario == "sleeping_graphs":
            more |= {
                "enforce_eager": False,
                "dtype": "bfloat16",
                "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            }
        llm = engine(Path(folder), shape, **more)
        globals()[scenario](llm)


if __name__ == "__main__":
    main()
