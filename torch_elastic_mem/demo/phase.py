"""The elastic phase: both tenants in one arena, each on its own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

import torch_elastic_mem as tem
from torch_elastic_mem.demo.bursts import Arrival
from torch_elastic_mem.demo.decoder import PagedDecoder
from torch_elastic_mem.demo.model import Weights
from torch_elastic_mem.demo.sample import History, Recorder, Sample
from torch_elastic_mem.demo.scale import Scale
from torch_elastic_mem.demo.server import Request, Server
from torch_elastic_mem.demo.tenant import TrainingTenant
from torch_elastic_mem.demo.text import Text
from torch_elastic_mem.demo.trainer import Trainer
from torch_elastic_mem.demo.worker import Worker

_SAMPLE_SECONDS = 0.05
# How much longer than asked a slow machine may take until its first step and its first yield.
_OVERTIME = 3
# Part of the phase for which room must last before training takes up again.
_SETTLE = 1 / 60


@dataclass(frozen=True)
class Stage:
    """What both the elastic phase and its proofs run on."""

    arena: tem.Arena
    training: tem.Account
    serving: tem.Account
    scale: Scale
    initial: torch.Tensor
    text: Text

    def trainer(
        self, boundary: Callable[[], None] | None = None, cold: torch.Tensor | None = None
    ) -> Trainer:
        """Builds a trainer in the memory that the calling thread allocates from."""
        return Trainer(self.scale, self.initial, self.text, self.arena.device, boundary=boundary, cold=cold)

    def weights(self) -> Weights:
        """Copies the first weights, for serving, into the memory that the calling thread allocates from."""
        return Weights(self.scale.shape, self.initial.to(self.arena.device, copy=True))

    def server(self, arrivals: list[Arrival], blocks: int | None = None) -> Server:
        """Builds a server whose weights and cache are charged to the serving account.

        Args:
            arrivals: What it is to serve.
            blocks: Blocks of its cache; by default as many as the whole arena could back.
        """
        shape, block_tokens = self.scale.shape, self.scale.block_tokens
        with self.serving.allocations():
            weights = self.weights()
        kv = tem.ElasticKVTensor(
            self.serving,
            blocks or self.scale.capacity // self.scale.block_bytes,
            (2, block_tokens, shape.heads, shape.head_dim),
            torch.float32,
            layers=shape.layers,
        )
        return Server(kv, PagedDecoder(weights, kv, block_tokens), arrivals, block_tokens)

    def serve(self, server: Server, stop: threading.Event) -> None:
        """Runs a server on the calling thread, in the serving account and on a stream of its own."""
        with self.serving.allocations():
            if self.arena.backend == "cuda":
                stream = torch.cuda.Stream(self.arena.device)
                stream.wait_stream(torch.cuda.default_stream(self.arena.device))
                with torch.cuda.stream(stream):
                    server.run(stop)
                stream.synchronize()
            else:
                server.run(stop)


@dataclass(frozen=True)
class Outcome:
    """What the elastic phase left: values only, no tensor of the arena."""

    losses: list[float]
    served: list[Request]
    history: History
    seconds: float
    abandoned: int
    spilled_bytes: int
    given_bytes: int
    returned_bytes: int
    preemptions: int
    compactions: int
    compacted_bytes: int


def run_elastic(
    stage: Stage, arrivals: list[Arrival], seconds: float, show: Callable[[History, Sample], None]
) -> Outcome:
    """Trains and serves for `seconds`; `show` gets every sample on the calling thread.

    An interrupt of the calling thread ends both tenants and is raised again.
    """
    scale = stage.scale
    pinned = stage.arena.backend == "cuda"
    cold = torch.empty(2, stage.initial.numel(), pin_memory=pinned)
    tenant = TrainingTenant(
        stage.training,
        lambda boundary: stage.trainer(boundary, cold),
        micro_batches=scale.micro_batches,
        peak_bytes=scale.training_peak,
        capacity=scale.capacity,
        settle=seconds * _SETTLE,
    )
    server = stage.server(arrivals)
    recorder = Recorder(stage.arena, tenant, server)
    history = recorder.history
    stop_serving = threading.Event()
    training = Worker("tem-demo-training", tenant.run)
    serving = Worker("tem-demo-serving", lambda: stage.serve(server, stop_serving))
    alarm = threading.Event()

    def watch() -> None:
        alarm.wait(_SAMPLE_SECONDS)
        show(history, recorder.take())

    try:
        training.start()
        serving.start()
        while training.error is None and serving.error is None:
            now = history.seconds()
            if now >= seconds and ((tenant.losses and history.yields) or now >= seconds * _OVERTIME):
                break
            watch()
        stop_serving.set()
        serving.result()
        # Training ends last: with the burst gone, it finishes the step that it gave way in.
        tenant.finish()
        while training.is_alive():
            watch()
        training.result()
        elapsed = history.seconds()
    except BaseException:
        stop_serving.set()
        tenant.cancel()
        for worker in (serving, training):
            if worker.ident is not None:
                worker.join()
        # The traceback keeps this frame, which must not keep tensors of an arena that is about to be closed.
        del recorder, server, tenant
        raise
    show(history, recorder.take())
    given = tenant.let_go + sum(yielded.given for yielded in history.yields)
    return Outcome(
        losses=tenant.losses,
        served=server.served(),
        history=history,
        seconds=elapsed,
        abandoned=tenant.abandoned,
        spilled_bytes=tenant.spilled,
        given_bytes=given,
        returned_bytes=min(given, tenant.regained),
        preemptions=server.preemptions,
        compactions=server.compactions,
        compacted_bytes=server.compacted_bytes,
    )
