"""Requests that arrive as they please, whether the engine keeps up or not, and what each of them saw."""

from __future__ import annotations

import hashlib
import random
import time
from itertools import pairwise
from typing import Any

import msgspec

from benchmarks.timing import percentile


class Load(msgspec.Struct, frozen=True):
    """A load. Equal ones bring equal requests at equal times.

    Attributes:
        rate: requests a second, with exponential gaps; 0: all at once.
        count: requests.
        prompt, output: tokens of each.
        seed: of the prompts and the gaps.
        vocabulary: tokens are drawn below it.
    """

    rate: float
    count: int
    prompt: int
    output: int
    seed: int
    vocabulary: int

    def __str__(self) -> str:
        """For the tables."""
        return f"{self.rate:g}/s" if self.rate else "all at once"


class Seen(msgspec.Struct):
    """What a load saw. Times are in seconds.

    Attributes:
        output_per_second: tokens that came, by the time from the first arrival to the last token.
        ttft, tpot: of each request.
        itl: between two outputs of one request: of all requests, the percentiles from 0 to 100.
        tokens: a digest of each request's tokens.
    """

    seconds: float
    output_per_second: float
    ttft: list[float]
    tpot: list[float]
    itl: list[float]
    tokens: list[str]


def run(engine: Any, load: Load) -> Seen:
    """Drives vLLM's `LLMEngine` with the load, on this thread."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rng = random.Random(load.seed)
    sampling = SamplingParams(
        max_tokens=load.output,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    due, at = [], 0.0
    for number in range(load.count):
        prompt = [rng.randrange(3, load.vocabulary) for _ in range(load.prompt)]
        due.append((at, f"{load.seed}-{number}", prompt))
        at += rng.expovariate(load.rate) if load.rate else 0.0
    due.reverse()
    arrived: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for _, name, _ in due}
    tokens: dict[str, list[int]] = {name: [] for _, name, _ in due}
    start = time.perf_counter()
    while due or engine.has_unfinished_requests():
        now = time.perf_counter() - start
        while due and due[-1][0] <= now:
            when, name, prompt = due.pop()
            arrived[name] = when
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, due[-1][0] - (time.perf_counter() - start)))
            continue
        for output in engine.step():
            new = list(output.outputs[0].token_ids)
            if new:
                times[output.request_id].append(time.perf_counter() - start)
                tokens[output.request_id] += new
    if short := [name for name, each in tokens.items() if len(each) != load.output]:
        raise RuntimeError(f"{len(short)} requests did not get all their tokens: {short[:3]}")
    seconds = max(each[-1] for each in times.values())
    return Seen(
        seconds,
        load.count * load.output / seconds,
        [each[0] - arrived[name] for name, each in times.items()],
        [(each[-1] - each[0]) / max(1, load.output - 1) for each in times.values()],
        _percentiles([after - before for each in times.values() for before, after in pairwise(each)]),
        [hashlib.sha256(str(each).encode()).hexdigest()[:12] for each in tokens.values()],
    )


def _percentiles(values: list[float]) -> list[float]:
    """A hundred and one of them stand for some ten thousand readings."""
    return [percentile(values, percent) for percent in range(101)]
