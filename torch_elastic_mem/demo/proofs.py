"""Runs again, without the other tenant, what the elastic phase has done, and compares bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch_elastic_mem.demo.pair import Pair
from torch_elastic_mem.demo.phase import Outcome
from torch_elastic_mem.demo.side import Side
from torch_elastic_mem.demo.worker import Progress

_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Verdict:
    """What was found. `uncached_tokens` counts the tokens that were decoded again without a cache."""

    loss_equal: bool
    tokens_equal: bool
    uncached_equal: bool
    uncached_tokens: int


def prove(pair: Pair, outcome: Outcome, show: Callable[[list[Progress]], None]) -> Verdict:
    """Repeats an outcome. `show` gets how far that is, ten times a second, on the calling thread.

    On the host training repeats in plain memory while serving repeats with all that is shared, each on a
    core. A GPU does one after the other, so that each has all of it.
    """
    training, serving = pair.training, pair.serving
    sides: list[Side[Any, Any, Any]] = [training, serving]

    def watch() -> None:
        while any(side.running for side in sides):
            time.sleep(_LOOK_SECONDS)
            for side in sides:
                side.check()
            show([progress for side in sides for progress in side.progress()])

    training.prove()
    if pair.setting.backend != "host":
        watch()
    serving.prove()
    watch()
    losses, again = training.proof(), serving.proof()
    return Verdict(
        loss_equal=bool(losses) and losses == outcome.training.losses,
        tokens_equal=bool(again.tokens)
        and again.tokens == [request.produced for request in outcome.serving.served],
        uncached_equal=again.uncached > 0 and again.uncached_equal == again.uncached,
        uncached_tokens=again.uncached,
    )
