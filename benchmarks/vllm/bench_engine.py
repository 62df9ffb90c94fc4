"""One model: stock vLLM, ours, and ours under a squeeze, in turns.

Run as python -m benchmarks.vllm.bench_engine --help.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from benchmarks import machine
from benchmarks.options import backend_option, errors_as_messages, out_option
from benchmarks.results import Result, command_line
from benchmarks.terminal import progress, publish
from benchmarks.vllm.engine import CONTROL, KVCACHED, OURS, STOCK, opening_of
from benchmarks.vllm.engine_tables import SQUEEZED, tables
from benchmarks.vllm.engine_worker import Squeeze
from benchmarks.vllm.load import Load
from benchmarks.vllm.shapes import SHAPES
from benchmarks.worker import Worker, WorkerError, ask_all, started
from torch_elastic_mem.device import device_of

MIB, GIB = 1 << 20, 1 << 30
STARTING = 400.0
# What a squeeze leaves of the cache.
LEFT = 0.25
IDLE_BYTES = 8 * GIB


def loads_of(rates: tuple[float, ...], shape: str, seconds: float, on_cuda: bool, turn: int) -> list[Load]:
    """The loads of a round; each round draws its own requests."""
    prompt, output = (256, 128) if on_cuda else (128, 32)
    return [
        Load(
            rate,
            max(8, int(rate * seconds)) if rate else (256 if on_cuda else 32),
            prompt,
            output,
            1000 * turn + number,
            SHAPES[shape]["vocab_size"],
        )
        for number, rate in enumerate(rates)
    ]


class Rounds:
    """The loads, contender after contender, round after round."""

    def __init__(self, workers: dict[str, Worker], squeeze: Squeeze) -> None:
        self._workers = workers
        self._squeeze = squeeze
        self.loads: dict[str, dict[str, list[Any]]] = {}
        self.idle: list[Any] = []
        self.failures: dict[str, str] = {}

    def run(self, rounds: list[list[Load]]) -> None:
        """The first round warms up, and is not kept. Each begins with another contender.

        Who follows a heavy load finds a hotter device, and who follows the squeeze has lost its memory. An
        interrupt ends it. Rounds count that all have served who did not fail.
        """
        names = [*self._workers, SQUEEZED]
        try:
            self._run(rounds, names)
        except KeyboardInterrupt:
            self.failures["the rest"] = "interrupted"
        for load, answers in self.loads.items():
            left = [len(answers.get(name, [])) for name in names if name not in self.failures]
            whole = min(left, default=0)
            self.loads[load] = {
                name: answers[name][:whole] for name in names if len(answers.get(name, [])) >= whole > 0
            }

    def _run(self, rounds: list[list[Load]], names: list[str]) -> None:
        with progress("serving", sum(map(len, rounds)) * len(names)) as advance:
            for number, loads in enumerate(rounds):
                first = number % len(names)
                for load in loads:
                    for name in names[first:] + names[:first]:
                        self._take(load, name, kept=number > 0)
                        advance(1)
                        if number > 0 and name == OURS and load is loads[-1]:
                            self._take_idle()  # while its cache is full

    def _take(self, load: Load, name: str, *, kept: bool) -> None:
        if name in self.failures:
            return
        asked: dict[str, Any] = {"load": msgspec.to_builtins(load)}
        if name == SQUEEZED:
            asked["squeeze"] = msgspec.to_builtins(self._squeeze)
        try:
            seen = self._workers[OURS if name == SQUEEZED else name].ask(asked)
        except WorkerError as error:
            self.failures[name] = str(error)
            return
        if kept:
            self.loads.setdefault(str(load), {}).setdefault(name, []).append(seen)

    def _take_idle(self) -> None:
        try:
            self.idle.append(self._workers[OURS].ask({"idle": IDLE_BYTES}))
        except WorkerError as error:
            self.failures["idle"] = str(error)


@click.command()
@backend_option
@click.option("--shape", type=click.Choice(list(SHAPES)), help="[default: llama-8b; tiny on host]")
@click.option(
    "--rate",
    "rates",
    multiple=True,
    type=click.FloatRange(min=0),
    help="Requests a second; 0: all at once. May be given several times. [default: 4, 16, 0]",
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Turns of each.")
@click.option("--seconds", default=8.0, show_default=True, help="How long requests arrive, at each rate.")
@click.option("--eager", is_flag=True, help="Without CUDA graphs and compilation.")
@click.option("--kvcached", is_flag=True, help="Beside kvcached too, which is to be installed.")
@click.option(
    "--control", is_flag=True, help="Beside a second stock engine too: how far are two of one kind apart?"
)
@out_option
def main(
    backend: str,
    shape: str | None,
    rates: tuple[float, ...],
    rounds: int,
    seconds: float,
    eager: bool,
    kvcached: bool,
    control: bool,
    out: Path | None,
) -> None:
    """One model under stock vLLM and under ours, at rates from light to beyond saturation."""
    on_cuda = device_of(backend)[0] == "cuda"
    rates = rates or ((4.0, 16.0, 0.0) if on_cuda else (8.0, 0.0))
    opening = opening_of(on_cuda, shape, eager)
    turns = [loads_of(rates, opening.shape, seconds, on_cuda, turn) for turn in range(rounds + 1)]
    granularity = 2 * MIB
    squeeze = Squeeze(
        int(opening.kv_bytes * (1 - LEFT)) // granularity * granularity, 1.0 if on_cuda else 0.3
    )
    contenders = [STOCK, *[KVCACHED] * kvcached, OURS, *[CONTROL] * control]
    with errors_as_messages(), started("vllm.engine_worker", contenders, backend) as workers:
        asked = {"open": msgspec.to_builtins(opening)}
        facts = ask_all(workers, asked, STARTING, label="starting the engines")
        taken = Rounds(workers, squeeze)
        taken.run(turns)
        # Before the engines are ended, which takes a while: an interrupt then costs nothing.
        failed = [f"{name} failed: {error}." for name, error in taken.failures.items()]
        result = Result(
            "bench_engine",
            command_line("vllm.bench_engine", sys.argv[1:]),
            machine.facts(gpu_uuid=None if not on_cuda else facts[OURS]["uuid"]),
            {
                "shape": opening.shape,
                "opening": msgspec.to_builtins(opening),
                "rates": list(rates),
                "rounds": rounds,
            },
            tables(taken.loads, taken.idle, failed),
            {"engines": facts, "loads": taken.loads, "idle": taken.idle},
        )
        publish(result, out, backend, failed)


if __name__ == "__main__":
    main()
