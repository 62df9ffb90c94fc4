"""The real engine with two ranks: `python -m tests.vllm.ranks_engine SCENARIO SPLIT`, as `tests.vllm.engine`.

The scheduler is in this process, and each rank is a process of its own: what is to happen there goes to it as
a function.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from tests.vllm import late_copies, weights
from tests.vllm.engine import CACHE, engine, fact, may_sleep, prompts, sampling, tokens
from tests.vllm.late_copies import LATE, NEVER
from tests.vllm.pressing import Pressing
from torch_elastic_mem.integrations.vllm.grower import REST

SPLITS = {"tensor": {"tensor_parallel_size": 2}, "pipeline": {"pipeline_parallel_size": 2}}


def on_ranks(llm: Any, fn: Callable[[Any], Any]) -> list[Any]:
    """What the function says of each rank's worker."""
    core = llm.llm_engine.engine_core.engine_core
    return list(core.model_executor.collective_rpc(lambda wrapper: fn(wrapper.worker)))


def prepare(worker: Any) -> None:
    """The CPU engine makes these where a graph is captured, and it captures none."""
    from vllm.distributed.parallel_state import get_pp_group

    runner = worker.model_runner
    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def resident(worker: Any) -> int:
    return int(worker.elastic_cache.resident_bytes)


def chunks(worker: Any) -> list[int]:
    """Those that have memory."""
    cache = worker.elastic_cache
    part, _ = cache._parts[0]
    size = cache.chunk_blocks
    return [
        chunk
        for chunk in range(cache.num_chunks)
        if all(
            part.is_resident(block)
            for block in range(chunk * size, min((chunk + 1) * size, cache.num_blocks))
        )
    ]


def press(worker: Any) -> None:
    worker.pressing = Pressing(worker).__enter__()


def relieve(worker: Any) -> dict[str, Any]:
    other = worker.pressing
    other.__exit__()
    return {"met": other.met, "least": other.least, "quarter": other.arena.capacity // 4}


def plain(llm: Any) -> None:
    fact("scheduler", type(llm.llm_engine.engine_core.engine_core.scheduler).__name__)
    fact("tokens", [tokens(llm, 1, 20), tokens(llm, 2, 10), tokens(llm, 3, 10)])


def squeezed(llm: Any) -> None:
    """Somebody on each rank's arena, at times of their own; then on one alone, while the engine is idle."""
    core = llm.llm_engine.engine_core.engine_core
    fact("scheduler", type(core.scheduler).__name__)
    fact("started by", on_ranks(llm, lambda worker: worker.parallel_config.distributed_executor_backend))
    fact("resident at first", on_ranks(llm, resident))
    on_ranks(llm, press)
    first = tokens(llm, 1, 20)
    fact("pressed", on_ranks(llm, relieve))
    fact("chunks after", [*on_ranks(llm, chunks), core.scheduler.elastic.balloon.resident()])
    fact("kept when nobody asks", on_ranks(llm, resident))

    def take_all_on_one(worker: Any) -> int:
        if worker.rank == 1:
            room = worker.pressing.arena.capacity - worker.elastic_cache.chunk_bytes
            worker.pressing.range.grow(room, timeout=10.0)
        return int(worker.elastic_cache.chunk_bytes)

    fact("chunk", on_ranks(llm, take_all_on_one))
    fact("kept when one asks", on_ranks(llm, resident))

    def refuse_one(worker: Any) -> None:
        if worker.rank == 1:
            worker.pressing.range.shrink(worker.pressing.range.mapped)
            worker.elastic_account.set_limits(max=worker.elastic_cache.resident_bytes)

    on_ranks(llm, refuse_one)
    core.scheduler.elastic.grower.refusals = 0
    second = tokens(llm, 2, 10)
    core.scheduler.elastic.grower.settle(60.0)
    fact("under one's limit", on_ranks(llm, resident))
    fact("refusals", core.scheduler.elastic.grower.refusals)
    fact("chunks under it", [*on_ranks(llm, chunks), core.scheduler.elastic.balloon.resident()])
    on_ranks(llm, lambda worker: worker.elastic_account.set_limits(max="max"))
    time.sleep(REST)
    third = tokens(llm, 3, 10)
    fact("grown again", on_ranks(llm, resident))
    fact("tokens", [first, second, third])
    with preempting(core.scheduler) as in_flight:
        fact("tokens of the preempted", tokens(llm, 1, 20))
    fact("in flight when preempted", sum(in_flight))


@contextmanager
def preempting(scheduler: Any) -> Iterator[list[int]]:
    """Preempts a request before every third step; yields the tokens that were in flight of each."""
    found: list[int] = []
    plain, steps = scheduler.schedule, count(1)

    def schedule(*args: Any, **kwargs: Any) -> Any:
        with scheduler.elastic.lock:
            if scheduler.running and next(steps) % 3 == 0:
                found.append(scheduler.running[-1].num_in_flight_tokens)
                scheduler._preempt_last()
            return plain(*args, **kwargs)

    scheduler.schedule = schedule
    try:
        yield found
    finally:
        del scheduler.schedule


def shared(llm: Any) -> None:
    """Two tenants of one broker; a line on stdin says when to go on."""
    first = tokens(llm, 1, 20)
    fact("tokens", first)
    fact("resident", on_ranks(llm, resident))
    fact("processes", on_ranks(llm, lambda worker: os.getpid()))
    sys.stdin.readline()
    fact("resident after", on_ranks(llm, resident))
    fact("tokens again", [tokens(llm, 2, 10), tokens(llm, 3, 10)])
    fact("chunks", on_ranks(llm, chunks))


def held(worker: Any) -> int:
    return int(worker.elastic_account.held)


def sleeping(llm: Any) -> None:
    """Both levels, a partial wake, and somebody who has one rank's memory, or all but a chunk of it."""
    import torch_elastic_mem as tem

    def narrow(worker: Any) -> int:
        from torch_elastic_mem.integrations.vllm import sleep

        sleep.WAKE = 0.05
        worker.elastic_arena.set_reserve(0, 0)
        worker.elastic_arena.set_capacity(worker.elastic_account.held + 32 * 2**20)
        return int(worker.elastic_sleep.bytes)

    def occupy(worker: Any) -> None:
        if worker.rank == 1:
            arena = worker.elastic_arena
            if not hasattr(worker, "neighbours"):
                worker.neighbours = arena.account("neighbour", tem.PriorityClass("pressing", 10**6))
            worker.neighbour = worker.neighbours.range(arena.capacity, extent="2MiB")
            worker.neighbour.grow(arena.capacity, timeout=1.0)

    def leave_a_chunk(worker: Any) -> None:
        if worker.rank == 1:
            worker.neighbour.shrink(worker.elastic_cache.chunk_bytes)
            worker.neighbours.trim()

    def leave(worker: Any) -> None:
        if worker.rank == 1:
            worker.neighbour.close()
            worker.elastic_arena.collect()

    def addresses(worker: Any) -> list[int]:
        return [each.data_ptr() for each in worker.model_runner.get_model().parameters()]

    def save(worker: Any) -> None:
        model = worker.model_runner.get_model()
        worker.saved = {name: each.clone() for name, each in model.named_parameters()}

    def load(worker: Any) -> None:
        for name, each in worker.model_runner.get_model().named_parameters():
            each.data.copy_(worker.saved[name])

    together = [tokens(llm, 1, 8)]
    before = on_ranks(llm, addresses)
    fact("weights", on_ranks(llm, narrow))
    llm.sleep(level=1)
    fact("asleep", on_ranks(llm, held))
    refusals = []

    def wake_beside(neighbour: Callable[[Any], None]) -> None:
        on_ranks(llm, neighbour)
        try:
            llm.wake_up()
        except tem.OutOfMemory as refusal:
            refusals.append([str(refusal), on_ranks(llm, held), llm.llm_engine.is_sleeping()])

    wake_beside(occupy)
    wake_beside(leave_a_chunk)
    on_ranks(llm, leave)
    llm.wake_up(tags=["weights"])
    fact("with weights", [on_ranks(llm, held), llm.llm_engine.is_sleeping()])
    llm.wake_up(tags=["kv_cache"])
    fact("with all", [on_ranks(llm, held), llm.llm_engine.is_sleeping()])
    fact("chunk", on_ranks(llm, lambda worker: worker.elastic_cache.chunk_bytes))
    together.append(tokens(llm, 1, 8))
    on_ranks(llm, save)
    llm.sleep(level=2)
    fact("asleep at level 2", on_ranks(llm, held))
    wake_beside(occupy)
    wake_beside(leave_a_chunk)
    fact("refusals", refusals)
    on_ranks(llm, leave)
    llm.wake_up()
    on_ranks(llm, load)
    together.append(tokens(llm, 1, 8))
    fact("addresses stay", before == on_ranks(llm, addresses))
    fact("tokens", together)


def offloading(llm: Any) -> None:
    """Blocks are copied to the host late, by each rank its part, and come back after they were dropped."""
    on_ranks(llm, press)
    told, found = [], []
    for _ in range(2):
        out = llm.generate(prompts(1, 20), sampling(12), use_tqdm=False)
        told.append([list(each.outputs[0].token_ids) for each in out])
        found.append(sum(each.num_cached_tokens or 0 for each in out))
        llm.reset_prefix_cache()
    fact("pressed", on_ranks(llm, relieve))
    fact("tokens", told)
    fact("found elsewhere", found)

    def copy_after(steps: int) -> None:
        def set_late(_: Any) -> None:
            late_copies.offloading.late = steps

        on_ranks(llm, set_late)

    def want_all_of_one(worker: Any) -> None:
        import torch_elastic_mem as tem

        if worker.rank == 1:
            # The null block's is not to be had: what can be given is, and goes back.
            with suppress(tem.OutOfMemory):
                worker.pressing.range.grow(worker.pressing.arena.capacity, timeout=1.0)

    core = llm.llm_engine.engine_core.engine_core
    copies, size = core.scheduler._copies, core.scheduler.elastic._cache.chunk_blocks
    copy_after(NEVER)
    llm.generate(prompts(2, 24), sampling(4), use_tqdm=False)
    core.step_fn()  # what has just ended gets its copies
    read = copies.blocks() - {0}
    on_ranks(llm, want_all_of_one)
    fact("left", [*on_ranks(llm, chunks), sorted({block // size for block in {0, *read}})])
    copy_after(0)
    while core.scheduler.has_requests():
        core.step_fn()
    on_ranks(llm, want_all_of_one)
    fact("left when copied", on_ranks(llm, chunks))


def options(scenario: str) -> dict[str, Any]:
    """Of the engine, beyond what all of them have."""
    if scenario == "sleeping":
        return {"enable_sleep_mode": may_sleep()}
    if scenario == "offloading":
        os.environ[LATE] = "10"
        extra = {"cpu_bytes_to_use": 2 * CACHE}
        connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
        return {"kv_transfer_config": connector | {"kv_connector_extra_config": extra}}
    return {}


def main() -> None:
    scenario, split = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["TEM_ENABLE"] = "0" if scenario == "plain" else "1"
    os.dup2(2, 1)
    weights.draw_in_children()
    with tempfile.TemporaryDirectory() as folder:
        llm = engine(Path(folder), "tiny", **SPLITS[split], **options(scenario))
        on_ranks(llm, prepare)
        globals()[scenario](llm)
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
