"""Training, in this process: the elastic phase, and the same steps alone."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from torch_elastic_mem.demo.side import LocalSide, TrainingMoment, TrainingOutcome
from torch_elastic_mem.demo.stage import Stage
from torch_elastic_mem.demo.tenant import TrainingTenant
from torch_elastic_mem.demo.trainer import train
from torch_elastic_mem.demo.worker import Task

# Part of the phase for which room must last before training takes up again.
_SETTLE = 1 / 60


class LocalTraining(LocalSide[TrainingMoment, TrainingOutcome, list[float]]):
    """Trains until it is told to finish, and yields what it holds meanwhile.

    Args:
        stage: What it runs on.
        seconds: Length of the elastic phase.
    """

    name = "training"

    def __init__(self, stage: Stage, seconds: float) -> None:
        super().__init__(stage)
        cold = torch.empty(2, stage.initial.numel(), pin_memory=stage.arena.backend == "cuda")
        self._tenant = TrainingTenant(
            stage.account,
            lambda boundary: stage.trainer(boundary, cold),
            micro_batches=stage.scale.micro_batches,
            peak_bytes=stage.scale.training_peak,
            capacity=stage.scale.capacity,
            settle=seconds * _SETTLE,
        )

    def moment(self) -> TrainingMoment:
        tenant = self._tenant
        # Read once: the tenant's thread adds to it.
        losses = tenant.losses[:]
        return TrainingMoment(
            used=self._stage.used(),
            state=tenant.state,
            steps=len(losses),
            progress=tenant.progress,
            loss=losses[-1] if losses else None,
            abandoned=tenant.abandoned,
        )

    def finish(self) -> None:
        self._tenant.finish()

    def _play(self) -> None:
        self._tenant.run()

    def _halt(self) -> None:
        self._tenant.cancel()

    def _left(self) -> TrainingOutcome:
        tenant = self._tenant
        return TrainingOutcome(
            tenant.losses, tenant.abandoned, tenant.spilled, tenant.let_go, tenant.regained
        )

    def _prove(self, outcome: TrainingOutcome) -> list[float]:
        alone = Task("training alone", len(outcome.losses), self._stop)
        self._tasks = [alone]
        # In plain memory on the host, so that serving repeats in the arena meanwhile, each on a core.
        on_host = self._stage.arena.backend == "host"
        with nullcontext() if on_host else self._stage.account.allocations():
            trainer = self._stage.trainer()
            return [train(trainer, self._stage.scale.micro_batches) for _ in alone.over(range(alone.total))]
