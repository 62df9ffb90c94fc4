"""Runs again, without the other tenant, what the elastic phase has done, and compares bit by bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch_elastic_mem.demo.bursts import Arrival
from torch_elastic_mem.demo.decoder import next_logits
from torch_elastic_mem.demo.phase import Outcome, Stage
from torch_elastic_mem.demo.server import Request
from torch_elastic_mem.demo.trainer import train
from torch_elastic_mem.demo.worker import Task, Worker

_SAMPLED_REQUESTS = 8
_SAMPLED_TOKENS = 16
# With and without a cache, the same sums are added in another order. Two tokens whose logits lie closer than
# that can change places; anything further apart is a difference.
_ROUNDING = 1e-4
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Verdict:
    """What was found. `uncached_tokens` counts the tokens that were decoded again without a cache."""

    loss_equal: bool
    tokens_equal: bool
    uncached_equal: bool
    uncached_tokens: int


def prove(stage: Stage, outcome: Outcome, show: Callable[[list[Task]], None]) -> Verdict:
    """Repeats an outcome. `show` gets the tasks, ten times a second, on the calling thread.

    On the host training repeats in plain memory while serving repeats in the arena, each on a core. A GPU
    does one after the other, so that each has the whole arena.
    """
    sample = _sample(outcome.served)
    stop = threading.Event()
    alone = Task("training alone", len(outcome.losses), stop)
    again = Task("serving with all memory", len(outcome.served), stop)
    uncached = Task("decoding without a cache", sum(len(tokens) for _, tokens in sample), stop)
    tasks = [alone, again, uncached]

    def training() -> list[float]:
        on_host = stage.arena.backend == "host"
        with nullcontext() if on_host else stage.training.allocations():
            trainer = stage.trainer()
            return [train(trainer, stage.scale.micro_batches) for _ in alone.over(range(alone.total))]

    def serving() -> tuple[list[list[int]], int]:
        return _serve_again(stage, outcome.served, again), _count_uncached(stage, sample, uncached)

    first = Worker("tem-demo-alone", training)
    second = Worker("tem-demo-again", serving)
    try:
        first.start()
        if stage.arena.backend != "host":
            _watch([first], tasks, show)
        second.start()
        _watch([first, second], tasks, show)
        losses = first.result()
        tokens, agreed = second.result()
    finally:
        stop.set()
        for worker in (first, second):
            if worker.ident is not None:
                worker.join()
    return Verdict(
        loss_equal=bool(losses) and losses == outcome.losses,
        tokens_equal=bool(tokens) and tokens == [request.produced for request in outcome.served],
        uncached_equal=uncached.total > 0 and agreed == uncached.total,
        uncached_tokens=uncached.total,
    )


def _watch(workers: list[Worker[Any]], tasks: list[Task], show: Callable[[list[Task]], None]) -> None:
    while any(worker.is_alive() for worker in workers):
        time.sleep(_LOOK_SECONDS)
        show(tasks)


def _serve_again(stage: Stage, served: list[Request], task: Task) -> list[list[int]]:
    arrivals = [Arrival(0.0, request.prompt, len(request.produced)) for request in served]
    server = stage.server(arrivals)
    task.follow(server.finished)
    stage.serve(server, task.stop)
    return [request.produced for request in server.served()]


def _sample(served: list[Request]) -> list[tuple[Request, list[int]]]:
    spread = served[:: max(1, len(served) // _SAMPLED_REQUESTS)][:_SAMPLED_REQUESTS]
    return [(request, request.produced[:_SAMPLED_TOKENS]) for request in spread]


def _count_uncached(stage: Stage, sample: list[tuple[Request, list[int]]], task: Task) -> int:
    agreed = 0
    with stage.serving.allocations():
        weights = stage.weights()
        decoded = [
            ([*request.prompt, *tokens[:known]], token)
            for request, tokens in sample
            for known, token in enumerate(tokens)
        ]
        for context, token in task.over(decoded):
            found = next_logits(weights, context)
            agreed += bool(found[token] >= found.max() - _ROUNDING)
    return agreed
