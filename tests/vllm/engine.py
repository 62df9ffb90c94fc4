"""The real engine: `python -m tests.vllm.engine SCENARIO SHAPE`. Prints a line of JSON a fact."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.vllm import shapes

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

    return LLM(
        model=str(shapes.write(shape, folder)),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=CACHE,
        block_size=BLOCK,
        enforce_eager=True,
        disable_log_stats=False,
        seed=0,
        **more,
    )


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


class Pressing:
    """Somebody of a higher class in this process, who takes up to three quarters and gives them back."""

    def __init__(self, worker: Any) -> None:
        import torch_elastic_mem as tem

        self.arena, self.cache = worker.elastic_arena, worker.elastic_cache
        self.account = self.arena.account("pressing", tem.PriorityClass("pressing", 10**6))
        self.range = self.account.range("1GiB")
        self.met: list[bool] = []
        self.least = CACHE
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._press)

    def __enter__(self) -> Pressing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _press(self) -> None:
        import torch_elastic_mem as tem

        rng = random.Random(3)
        while not self._done.wait(0.05):
            wanted = int(rng.choice((0.25, 0.5, 0.75)) * self.arena.capacity) // (2 * MiB) * 2 * MiB
            try:
                self.range.grow(wanted, timeout=5.0)
            except tem.OutOfMemory:
                self.met.append(False)
                continue
            self.met.append(True)
            self.least = min(self.least, self.cache.resident_bytes)
            self._done.wait(0.1)
            self.range.shrink(wanted)
            # A request must get on between two squeezes, on a slow machine too.
            self._done.wait(0.2)


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


def apart(llm: Any) -> None:
    """The engine in a process of its own; a line on stdin says when to go on."""
    fact("tokens", [tokens(llm, 1), None])
    sys.stdin.readline()
    fact("tokens again", tokens(llm, 2, 40))
    llm.llm_engine.engine_core.shutdown()


def main() -> None:
    scenario, shape = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if scenario == "apart" else "0"
    os.environ["TEM_ENABLE"] = "0" if scenario == "plain" else "1"
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        llm = engine(Path(folder), shape, async_scheduling=True if scenario == "squeezed" else None)
        globals()[scenario](llm)


if __name__ == "__main__":
    main()
