"""Serving, in this process: the elastic phase, and the same requests with all memory."""

from __future__ import annotations

import threading

from torch_elastic_mem.demo.bursts import Arrival
from torch_elastic_mem.demo.decoder import next_logits
from torch_elastic_mem.demo.server import Request, Server
from torch_elastic_mem.demo.side import LocalSide, ServedAgain, ServingMoment, ServingOutcome
from torch_elastic_mem.demo.stage import Stage
from torch_elastic_mem.demo.worker import Task

_SAMPLED_REQUESTS = 8
_SAMPLED_TOKENS = 16
# With and without a cache, the same sums are added in another order. Two tokens whose logits lie closer than
# that can change places; anything further apart is a difference.
_ROUNDING = 1e-4


class LocalServing(LocalSide[ServingMoment, ServingOutcome, ServedAgain]):
    """Serves arrivals until it is told to finish.

    Args:
        stage: What it runs on.
        arrivals: What it is to serve.
    """

    name = "serving"

    def __init__(self, stage: Stage, arrivals: list[Arrival]) -> None:
        super().__init__(stage)
        # Here, so that the phase does not begin with a model that is still being loaded.
        self._server: Server | None = stage.server(arrivals)
        self._finish = threading.Event()
        self._last = ServingMoment()

    def moment(self) -> ServingMoment:
        if self._server is not None:
            server = self._server
            self._last = ServingMoment(self._stage.used(), server.tokens, server.running, server.waiting)
        return self._last

    def finish(self) -> None:
        self._finish.set()

    def _play(self) -> None:
        assert self._server is not None
        self._stage.serve(self._server, self._finish)

    def _halt(self) -> None:
        self._finish.set()
        if self._worker is not None:
            self._worker.join()
        self._server = None

    def _left(self) -> ServingOutcome:
        assert self._server is not None
        self.moment()
        server, self._server = self._server, None
        return ServingOutcome(server.served(), server.preemptions, server.compactions, server.compacted_bytes)

    def _prove(self, outcome: ServingOutcome) -> ServedAgain:
        sample = _sample(outcome.served)
        again = Task("serving with all memory", len(outcome.served), self._stop)
        uncached = Task("decoding without a cache", sum(len(tokens) for _, tokens in sample), self._stop)
        self._tasks = [again, uncached]
        tokens = self._serve_again(outcome.served, again)
        return ServedAgain(tokens, uncached.total, self._count_uncached(sample, uncached))

    def _serve_again(self, served: list[Request], task: Task) -> list[list[int]]:
        arrivals = [Arrival(0.0, request.prompt, len(request.produced)) for request in served]
        server = self._stage.server(arrivals)
        task.follow(server.finished)
        self._stage.serve(server, task.stop)
        return [request.produced for request in server.served()]

    def _count_uncached(self, sample: list[tuple[Request, list[int]]], task: Task) -> int:
        agreed = 0
        with self._stage.account.allocations():
            weights = self._stage.weights()
            decoded = [
                ([*request.prompt, *tokens[:known]], token)
                for request, tokens in sample
                for known, token in enumerate(tokens)
            ]
            for context, token in task.over(decoded):
                found = next_logits(weights, context)
                agreed += bool(found[token] >= found.max() - _ROUNDING)
        return agreed


def _sample(served: list[Request]) -> list[tuple[Request, list[int]]]:
    spread = served[:: max(1, len(served) // _SAMPLED_REQUESTS)][:_SAMPLED_REQUESTS]
    return [(request, request.produced[:_SAMPLED_TOKENS]) for request in spread]
