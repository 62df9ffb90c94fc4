"""Requests that arrive as they please, whether the engine keeps up or not, and what each of them saw."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from heapq import nlargest
from itertools import pairwise
from typing import Any

import msgspec

from benchmarks.timing import percentile

# So many of an engine's steps are kept of a load, to tell whether those of two engines were long at one time.
LONGEST = 10


class Arrival(msgspec.Struct, frozen=True):
    """A request: when it comes, in seconds from the start, its prompt, and how many tokens it wants."""

    at: float
    name: str
    prompt: list[int]
    output: int


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

    def arrivals(self) -> list[Arrival]:
        """Its requests, in order."""
        rng = random.Random(self.seed)
        found, at = [], 0.0
        for number in range(self.count):
            prompt = drawn(rng, self.prompt, self.vocabulary)
            found.append(Arrival(at, f"{self.seed}-{number}", prompt, self.output))
            at += rng.expovariate(self.rate) if self.rate else 0.0
        return found


class Seen(msgspec.Struct):
    """What a load saw. Times are in seconds.

    Attributes:
        seconds: from the start to the last token.
        output_per_second: tokens that came, by that time.
        ttft, tpot: of each request.
        itl: between two outputs of one request: of all requests, the percentiles from 0 to 100.
        tokens: a digest of each request's tokens.
        short: requests that did not get all of theirs.
        longest: the engine's longest steps: when they ended, from the start, and how long they took.
    """

    seconds: float
    output_per_second: float
    ttft: list[float]
    tpot: list[float]
    itl: list[float]
    tokens: list[str]
    short: int = 0
    longest: list[tuple[float, float]] = []


def drawn(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    """Tokens of a prompt; the lowest three have a meaning in the shapes here."""
    return [rng.randrange(3, vocabulary) for _ in range(count)]


def run(engine: Any, load: Load) -> Seen:
    """Drives vLLM's `LLMEngine` with the load, on this thread.

    Raises:
        RuntimeError: a request did not get all its tokens.
    """
    seen = drive(engine, load.arrivals(), time.monotonic())
    if seen.short:
        raise RuntimeError(f"{seen.short} requests did not get all their tokens")
    return seen


def drive(
    engine: Any,
    arrivals: Sequence[Arrival],
    start: float,
    stepped: Callable[[], object] = lambda: None,
) -> Seen:
    """Drives vLLM's `LLMEngine` with requests, on this thread.

    Args:
        engine: it serves nothing else.
        arrivals: in order of their times; at least one.
        start: by `time.monotonic`, which is one clock for all processes of a machine.
        stepped: called after each step.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    due = list(reversed(arrivals))
    times: dict[str, list[float]] = {each.name: [] for each in arrivals}
    tokens: dict[str, list[int]] = {each.name: [] for each in arrivals}
    steps: list[tuple[float, float]] = []
    while due or engine.has_unfinished_requests():
        now = time.monotonic() - start
        while due and due[-1].at <= now:
            request = due.pop()
            sampling = SamplingParams(
                max_tokens=request.output,
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(request.name, {"prompt_token_ids": request.prompt}, sampling)
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, due[-1].at - (time.monotonic() - start)))
            continue
        begun = time.monotonic() - start
        outputs = engine.step()
        ended = time.monotonic() - start
        steps.append((ended, ended - begun))
        for output in outputs:
            new = list(output.outputs[0].token_ids)
            if new:
                times[output.request_id].append(time.monotonic() - start)
                tokens[output.request_id] += new
        stepped()
    served = [each for each in arrivals if times[each.name]]
    seconds = max((times[each.name][-1] for each in served), default=0.0)
    spans = [times[each.name] for each in served]
    return Seen(
        seconds,
        sum(map(len, tokens.values())) / seconds if seconds else 0.0,
        [times[each.name][0] - each.at for each in served],
        [(span[-1] - span[0]) / max(1, each.output - 1) for span, each in zip(spans, served, strict=True)],
        _percentiles([after - before for span in spans for before, after in pairwise(span)]),
        [hashlib.sha256(str(each).encode()).hexdigest()[:12] for each in tokens.values()],
        sum(len(tokens[each.name]) != each.output for each in arrivals),
        nlargest(LONGEST, steps, key=lambda step: step[1]),
    )


def _percentiles(values: list[float]) -> list[float]:
    """A hundred and one of them stand for some ten thousand readings."""
    return [percentile(values, percent) for percent in range(101)]
