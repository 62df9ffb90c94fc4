"""Sequence lengths of training steps: prompts of a request trace, or a seeded log-normal."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.traces import Request

STEP = 64
# The median and the spread of prompts in the Azure code trace, as in traces.bursts().
_LOG_MEDIAN = 7.292
_LOG_SPREAD = 0.815


def rounded(length: int, longest: int) -> int:
    """A length a model takes: a multiple of 64, at least 64 and no more than `longest`."""
    return max(STEP, min(longest, -(-length // STEP) * STEP))


def of_requests(requests: Sequence[Request], steps: int, longest: int) -> list[int]:
    """The prompts of the first requests, from the start again where there are too few."""
    return [rounded(requests[step % len(requests)].prompt, longest) for step in range(steps)]


def log_normal(steps: int, longest: int, seed: int) -> list[int]:
    """Lengths as they are in practice: most short, a few at the limit. Equal seeds give equal lengths."""
    rng = random.Random(seed)
    return [rounded(int(rng.lognormvariate(_LOG_MEDIAN, _LOG_SPREAD)), longest) for _ in range(steps)]


def chosen(requests: Sequence[Request] | None, steps: int, longest: int, seed: int) -> list[int]:
    """Lengths from a trace where there is one, else drawn."""
    if requests is None:
        return log_normal(steps, longest, seed)
    return of_requests(requests, steps, longest)
