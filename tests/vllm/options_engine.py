"""An engine with options that change what is scheduled: `python -m tests.vllm.options_engine HOW WHICH`.

HOW is plain, or elastic: then it is squeezed while it serves the second half.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.vllm.engine import engine, fact
from tests.vllm.pressing import Pressing

OPTIONS: dict[str, dict[str, Any]] = {
    "no prefix caching": {"enable_prefix_caching": False},
    "no chunked prefill": {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048},
    "priorities": {"scheduling_policy": "priority"},
    "a bound for each prompt in a step": {"long_prefill_token_threshold": 40, "max_num_batched_tokens": 256},
    "asynchronous": {"async_scheduling": True},
    "admission by a step's need": {"scheduler_reserve_full_isl": False},
    "larger blocks": {"block_size": 64},
}
REQUESTS = 30
EVERY = 4  # steps from one request to the next


def requests(rng: random.Random) -> list[tuple[str, list[int], dict[str, Any], int]]:
    """Prompts of any length, many of which begin alike; sampling; a priority."""
    shared = [rng.randrange(3, 1000) for _ in range(700)]
    made = []
    for number in range(REQUESTS):
        prompt = shared[: rng.choice([0, 300, 700])] + [rng.randrange(3, 1000) for _ in range(2000)]
        sampling: dict[str, Any] = {"max_tokens": rng.randrange(4, 40)}
        sampling |= {1: {"logprobs": 3}, 2: {"prompt_logprobs": 1}}.get(number % 5, {})
        length = rng.choice([20, 100, 400, 900, 1500, 1990])
        made.append((str(number), prompt[:length], sampling, number % 3))
    return made


def served(llm: Any, rng: random.Random, priorities: bool) -> list[list[int]]:
    """The tokens of each request."""
    from vllm import SamplingParams

    found: dict[str, list[int]] = {}
    coming = requests(rng)
    step = 0
    while coming or llm.llm_engine.has_unfinished_requests():
        if coming and step % EVERY == 0:
            name, prompt, sampling, priority = coming.pop(0)
            how = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **sampling)
            more = {"priority": priority} if priorities else {}
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, how, **more)
        for each in llm.llm_engine.step():
            if each.finished:
                found[each.request_id] = list(each.outputs[0].token_ids)
        step += 1
    return [found[str(number)] for number in range(REQUESTS)]


def main() -> None:
    how, which = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["TEM_ENABLE"] = "0" if how == "plain" else "1"
    os.dup2(2, 1)
    small = {"max_num_batched_tokens": 128, "max_num_seqs": 6, "max_model_len": 2048}
    with tempfile.TemporaryDirectory() as folder:
        llm = engine(Path(folder), "tiny", **small | OPTIONS[which])
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        rng, priorities = random.Random(11), which == "priorities"
        tokens = [served(llm, rng, priorities)]
        other = nullcontext() if how == "plain" else Pressing(worker)
        with other:
            tokens.append(served(llm, rng, priorities))
        fact("tokens", tokens)
        if isinstance(other, Pressing):
            fact("met", other.met)
            fact("least", [other.least, other.arena.capacity])


if __name__ == "__main__":
    main()
