"""An engine of small steps and long prompts: `python -m tests.vllm.long_engine HOW SHAPE`."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.vllm.engine import engine, fact, sampling

LENGTHS = (2040, 300, 1500, 2040)
# Seconds after which a request waits in vain.
LONG = 100.0


def served(llm: Any) -> list[list[int]]:
    """The tokens of each prompt, all of which come at once."""
    rng = random.Random(3)
    for number, length in enumerate(LENGTHS):
        prompt = {"prompt_token_ids": [rng.randrange(3, 1000) for _ in range(length)]}
        llm.llm_engine.add_request(str(number), prompt, sampling(6))
    found: dict[str, list[int]] = {}
    end = time.monotonic() + LONG
    while llm.llm_engine.has_unfinished_requests() and time.monotonic() < end:
        for each in llm.llm_engine.step():
            if each.finished:
                found[each.request_id] = list(each.outputs[0].token_ids)
    return [found.get(str(number), []) for number in range(len(LENGTHS))]


def main() -> None:
    how, shape = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["TEM_ENABLE"] = "0" if how == "plain" else "1"
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        llm = engine(Path(folder), shape, max_num_batched_tokens=64, max_num_seqs=2, max_model_len=2048)
        core = llm.llm_engine.engine_core.engine_core
        cache = getattr(core.model_executor.driver_worker.worker, "elastic_cache", None)
        resident = lambda: cache and cache.resident_bytes // cache.chunk_bytes  # noqa: E731
        fact("chunks at first", resident())
        tokens = [served(llm)]
        if cache is not None:
            core.scheduler.elastic._asked("pause", 1 << 40, 5.0)
        fact("chunks after a squeeze", resident())
        fact("tokens", [*tokens, served(llm)])
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
