"""The real engine, whose blocks move meanwhile: `python -m tests.vllm.compacted_engine SCENARIO KIND`.

A kind is a shape, a way to draft for the shape `tiny`, or `wide`: that shape with larger blocks, fewer of
which share a chunk.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.vllm import shapes
from tests.vllm.engine import CACHE, engine, fact, sampling
from tests.vllm.models import speculating
from tests.vllm.pressing import confine

SEEDS = range(2)
SHORT, LONG = 6, 40  # tokens that are wanted
START = 160  # tokens, with which three of four begin
SPARE = 8  # blocks to go on with until the memory is back
EVERY = 12  # steps from one squeeze to the next
LATE = 0.03  # seconds


def requests(seed: int) -> dict[str, tuple[list[int], int]]:
    """Prompts and how many tokens are wanted: of every third many, and three of four begin alike."""
    rng = random.Random(seed)
    start = [rng.randrange(3, 1000) for _ in range(START)]
    found = {}
    for number in range(16):
        prompt = [rng.randrange(3, 1000) for _ in range(rng.randrange(60, 220))]
        found[f"{seed}-{number:02}"] = (start * (number % 4 > 0) + prompt, SHORT if number % 3 else LONG)
    return found


class Squeezing:
    """Somebody of a higher class wants all that dense blocks do not take, but for a few."""

    def __init__(self, llm: Any) -> None:
        import torch_elastic_mem as tem

        core = llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.elastic, self.cache = core.scheduler.elastic, core.scheduler.elastic._cache
        self.met: list[bool] = []
        self.moved: list[int] = []
        self.shared = self.hashed = 0
        self.preempted: list[dict[str, Any]] = []
        self._steps = 0
        self._arena = core.model_executor.driver_worker.worker.elastic_arena
        confine(self._arena, self.cache)
        # Where chunks share extents at their edges, one of them lies on more than its own bytes.
        self._most = max(self.cache.bytes_under([chunk]) for chunk in range(self.cache.num_chunks))
        account = self._arena.account("pressing", tem.PriorityClass("pressing", 10**6))
        self._range = account.range("1GiB")
        self._asking: threading.Thread | None = None
        plain_move, plain_preempt = self.elastic.balloon.move, self.scheduler._preempt_request

        def move(moves: list[tuple[int, int]]) -> None:
            blocks = [self.elastic.balloon._pool.blocks[source] for source, _ in moves]
            self.moved.append(len(blocks))
            self.shared += sum(block.ref_cnt > 1 for block in blocks)
            self.hashed += sum(block.block_hash is not None for block in blocks)
            plain_move(moves)

        def preempt(*args: Any, **more: Any) -> None:
            self.preempted.append(self._why())
            plain_preempt(*args, **more)

        self.elastic.balloon.move, self.scheduler._preempt_request = move, preempt

    def before_step(self) -> None:
        """Once the short ones have gone, and left holes."""
        if self._asking is not None and not self._asking.is_alive():
            self.end()
        elif self._asking is None and self._only_long_ones():
            self._steps += 1
            if self._steps % EVERY == 1:
                self._asking = threading.Thread(target=self._ask)
                self._asking.start()

    def _only_long_ones(self) -> bool:
        left = self.scheduler.requests.values()
        return bool(left) and all(each.max_tokens == LONG for each in left)

    def _why(self) -> dict[str, Any]:
        elastic, balloon = self.elastic, self.elastic.balloon
        return {
            "demands": [(each.rung, each.nbytes) for each in elastic._demands],
            "blocks": repr(balloon.counts()),
            "chunks": len(balloon.resident()),
            "steps": elastic._steps,
            "growing": [elastic.grower.working, elastic.grower.refused(), elastic.grower.refused(short=True)],
            "taken": self._range.mapped,
        }

    def end(self) -> None:
        if self._asking is not None:
            self._asking.join()
            self._asking = None
        if self._range.mapped:
            self._range.shrink(self._range.mapped)

    def _ask(self) -> None:
        import torch_elastic_mem as tem

        with self.elastic.lock:
            blocks = self.elastic.balloon.in_use() + 1 + SPARE
        dense = -(-blocks // self.cache.chunk_blocks)
        try:
            self._range.grow(self._arena.capacity - dense * self._most, timeout=60.0)
            self.met.append(True)
        except tem.OutOfMemory:
            self.met.append(False)


def serve(llm: Any, wanted: dict[str, tuple[list[int], int]], other: Squeezing | None = None) -> Any:
    """Tokens and cached tokens, by request."""
    for name, (prompt, count) in wanted.items():
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling(count))
    tokens, hits = {}, {}
    while llm.llm_engine.has_unfinished_requests():
        if other is not None:
            other.before_step()
        for each in llm.llm_engine.step():
            if each.finished:
                tokens[each.request_id] = list(each.outputs[0].token_ids)
                hits[each.request_id] = each.num_cached_tokens
    if other is not None:
        other.end()
    return [tokens[name] for name in wanted], [hits[name] for name in wanted]


def accepted(llm: Any) -> float:
    """Tokens that were drafted and found right."""
    counted = {each.name: each for each in llm.get_metrics()}.get("vllm:spec_decode_num_accepted_tokens")
    return 0.0 if counted is None else float(counted.value)


def let_go_late() -> None:
    """Fences pass late, as behind the steps of a GPU that has others to serve as well."""
    from tests.rungs import HostStream
    from torch_elastic_mem.elastic_kv import ElasticKVTensor

    def release(part: ElasticKVTensor, blocks: list[int]) -> None:
        stream = HostStream()
        stream.submit()
        part._core.release(blocks, stream.handle)
        threading.Timer(LATE, stream.complete).start()

    ElasticKVTensor.release = release  # type: ignore[method-assign, assignment]


def changes(kind: str, folder: Path) -> dict[str, Any]:
    """What an engine of this kind is given beside the shape `tiny`."""
    match kind:
        case "wide":
            shapes.SHAPES["tiny"] |= {
                "hidden_size": 512,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
            }
            return {"kv_cache_memory_bytes": 4 * CACHE}
        case "ngram":
            return speculating(folder, "ngram")
        case "draft":
            # The model itself: it drafts what is right as long as its own cache is.
            return speculating(folder, "draft_model", "tiny")
        case "eagle":
            shapes.SHAPES[kind] = shapes.SHAPES["tiny"] | {
                "num_hidden_layers": 1,
                "architectures": ["EagleLlamaForCausalLM"],
            }
            # Five layers: each one's blocks begin with an extent if there are so many.
            return speculating(folder, "eagle", kind) | {"kv_cache_memory_bytes": 5 * CACHE // 4}
    return {}


def plain(llm: Any) -> None:
    fact("tokens", [serve(llm, requests(seed))[0] for seed in SEEDS])
    fact("accepted", accepted(llm))


def moving(llm: Any) -> None:
    from torch_elastic_mem.integrations.vllm import controller

    # A step gets what it needs, on a slow machine too.
    controller.PATIENCE = 60.0
    other = Squeezing(llm)
    fact("tokens", [serve(llm, requests(seed), other)[0] for seed in SEEDS])
    fact("accepted", accepted(llm))
    last = requests(SEEDS[-1])
    long = {f"again-{name}": (prompt, count) for name, (prompt, count) in last.items() if count == LONG}
    again, hits = serve(llm, long)
    fact("again", again)
    fact("hits", hits)
    for name in ("met", "moved", "shared", "hashed", "preempted"):
        fact(name, getattr(other, name))


def late(llm: Any) -> None:
    let_go_late()
    moving(llm)


def main() -> None:
    scenario, kind = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["TEM_ENABLE"] = "0" if scenario == "plain" else "1"
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        more = changes(kind, folder)
        {"plain": plain, "moving": moving, "late": late}[scenario](
            engine(folder, "tiny" if more else kind, **more)
        )


if __name__ == "__main__":
    main()
