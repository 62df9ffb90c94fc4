"""Training under torch's own allocator and under ours: speed, memory, and bits.

Run as python -m benchmarks.bench_train --help.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from benchmarks import contenders, lengths, machine, traces
from benchmarks.contenders import OURS
from benchmarks.options import backend_option, errors_as_messages, out_option
from benchmarks.results import Result, command_line
from benchmarks.terminal import progress, publish
from benchmarks.train_models import RESNET, RESNET_BATCH, RESNET_STEPS, SHAPES
from benchmarks.train_tables import DRIPPED, tables
from benchmarks.train_worker import TrainRequest
from benchmarks.worker import Worker, WorkerError, started
from torch_elastic_mem.device import device_of

SEED = 20
MODELS = ["gpt-124m", "gpt-1b", RESNET]
TINY = ["gpt-tiny"]
GIB = 1 << 30
MIB = 1 << 20


class Drips(msgspec.Struct, frozen=True):
    """What a drip takes, and how often."""

    nbytes: int
    period: float

    def __str__(self) -> str:
        """For the tables."""
        size = f"{self.nbytes // GIB} GiB" if self.nbytes >= GIB else f"{self.nbytes // MIB} MiB"
        return f"{size} every {self.period * 1e3:g} ms"


CUDA_DRIP = Drips(GIB, 0.1)
HOST_DRIP = Drips(16 * MIB, 0.02)


def request_for(model: str, requests: Sequence[traces.Request] | None, steps: int | None) -> TrainRequest:
    """A turn of a model, the same for every contender and round."""
    if model == RESNET:
        count = steps or RESNET_STEPS
        return TrainRequest(model, [RESNET_BATCH] * count, max(1, count // 4))
    shape = SHAPES[model]
    count = steps or shape.steps
    found = lengths.chosen(requests, count, shape.longest, SEED)
    return TrainRequest(model, found, max(1, count // 4))


class Trainings:
    """Turns of all contenders over all models, and who failed at what."""

    def __init__(self, workers: Mapping[str, Worker], drip: Drips) -> None:
        self._workers = workers
        self._drip = drip
        self.answers: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.failures: dict[str, str] = {}
        self.uuid: str | None = None

    def run(self, turns: Sequence[TrainRequest], rounds: int) -> None:
        """Every contender trains every model once a round."""
        names = [*self._workers, DRIPPED]
        for turn in turns:
            self.answers[turn.model] = {name: [] for name in names if name in self._workers}
            if OURS in self._workers:
                self.answers[turn.model][DRIPPED] = []
        total = rounds * sum(len(answers) for answers in self.answers.values())
        with progress("training", total) as advance:
            for _ in range(rounds):
                for turn in turns:
                    for name in list(self.answers[turn.model]):
                        self._take(turn, name)
                        advance(1)

    def _take(self, turn: TrainRequest, name: str) -> None:
        answers = self.answers[turn.model]
        asked = turn
        if name == DRIPPED:
            undisturbed = answers.get(OURS)
            if not undisturbed:
                del answers[DRIPPED]
                return
            asked = msgspec.structs.replace(
                turn,
                drip_bytes=self._drip.nbytes,
                drip_period=self._drip.period,
                peak=undisturbed[-1]["reserved"],
            )
        worker = self._workers[OURS if name == DRIPPED else name]
        try:
            answer = worker.ask(msgspec.to_builtins(asked))
        except WorkerError as error:
            # Its other rounds do not count either: a ratio pairs the rounds of two contenders.
            del answers[name]
            self.failures[f"{turn.model}, {name}"] = str(error)
            return
        self.uuid = self.uuid or answer["uuid"]
        answers[name].append(answer)


@click.command()
@backend_option
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice([*SHAPES, RESNET]),
    help="Train this one only; may be given several times. [default: all; gpt-tiny on host]",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of each contender."
)
@click.option("--steps", type=click.IntRange(2), help="Steps a turn. [default: 24, and 12 of large models]")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Take sequence lengths from the prompts of this trace. [default: seeded, log-normal]",
)
@out_option
def main(
    backend: str,
    models: tuple[str, ...],
    rounds: int,
    steps: int | None,
    trace: Path | None,
    out: Path | None,
) -> None:
    """Train models under each allocator in turn, and once more while a higher class takes memory."""
    with errors_as_messages():
        host = device_of(backend)[0] == "host"
        requests = traces.read(trace) if trace else None
        turns = [request_for(model, requests, steps) for model in models or (TINY if host else MODELS)]
        drip = HOST_DRIP if host else CUDA_DRIP
        with started("train_worker", contenders.names(backend), backend) as workers:
            trainings = Trainings(workers, drip)
            trainings.run(turns, rounds)
    failed = [f"Failed: {what}: {why}." for what, why in trainings.failures.items()]
    units = {turn.model: "pictures" if turn.model == RESNET else "tokens" for turn in turns}
    drips = {turn.model: str(drip) for turn in turns}
    result = Result(
        benchmark="bench_train",
        command=command_line("bench_train", sys.argv[1:]),
        machine=machine.facts(gpu_uuid=trainings.uuid),
        settings={
            "backend": backend,
            "rounds": rounds,
            "lengths_from": trace.name if trace else f"log-normal, seed {SEED}",
            "turns": msgspec.to_builtins(turns),
            "shapes": {name: msgspec.to_builtins(shape) for name, shape in SHAPES.items()},
            "drip": msgspec.to_builtins(drip),
        },
        tables=tables(trainings.answers, units, drips, failed),
        raw={"answers": trainings.answers, "failures": trainings.failures},
    )
    publish(result, out, backend, failed)
    if trainings.failures:
        raise click.ClickException("; ".join(failed))


if __name__ == "__main__":
    main()
