"""What a step costs: batches of one size decode, by stock vLLM and by ours, in turns.

Run as python -m benchmarks.vllm.bench_step --help.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from benchmarks import machine
from benchmarks.figures import spread
from benchmarks.options import backend_option, errors_as_messages, out_option
from benchmarks.results import TARGET_COLUMNS, Result, Table, command_line, target_row
from benchmarks.terminal import publish
from benchmarks.timing import Summary, paired_ratio, percentile
from benchmarks.vllm.engine import CONTROL, OURS, STOCK, opening_of
from benchmarks.vllm.shapes import SHAPES
from benchmarks.vllm.steady import Batch, Steps
from benchmarks.worker import Worker, ask_all, started, take_turns
from torch_elastic_mem.device import device_of

STARTING = 400.0
TARGET = 1.01
PARTS = ("schedule", "launch", "sample", "update")

Answers = Mapping[str, Sequence[Steps]]


def tables(batches: Mapping[int, Answers], notes: Sequence[str]) -> list[Table]:
    """What all batches show, and whether ours is within the target.

    Args:
        batches: for each size what each contender's steps took, round by round.
        notes: what failed.
    """
    rows, targets = [], []
    for size, answers in batches.items():
        for name, seen in answers.items():
            if not seen:
                continue
            ratio = _ratio(seen, answers[STOCK]) if name != STOCK and answers.get(STOCK) else None
            rows.append(_row(size, name, seen, ratio))
            if name == OURS and ratio is not None:
                what, met = f"{_requests(size)}: a step over stock's", ratio.median <= TARGET
                measured = f"{ratio.median:.3f} ({ratio.q1:.3f} to {ratio.q3:.3f})"
                targets.append(target_row(what, measured, f"at most {TARGET}", met))
    columns = ["batch, engine", "a step", "over stock", "device: work", "pause", *PARTS]
    note = (
        "a step: the median as who drives the engine sees it, of all rounds; over stock: of the rounds' own "
        "medians, with quartiles. device: a step's work on its stream, with what it waits for once the step "
        "is being launched, and from its end to the next one's begin. The others: what the engine's thread "
        "spends in these calls; what of it goes on while the device works costs nothing."
    )
    return [
        Table("A step", columns, rows, " ".join([note, *notes])),
        Table("Targets", TARGET_COLUMNS, targets, "In brackets: quartiles of the rounds."),
    ]


def _row(size: int, name: str, seen: Sequence[Steps], ratio: Summary | None) -> list[str]:
    whole = percentile([each for steps in seen for each in steps.whole], 50)
    device = [
        _us([value for steps in seen if (value := getattr(steps, what)) is not None])
        for what in ("work", "pause")
    ]
    parts = [_us([steps.parts[part] for steps in seen if part in steps.parts]) for part in PARTS]
    return [
        f"{_requests(size)}, {name}",
        f"{whole * 1e3:.3f} ms",
        "" if ratio is None else spread(ratio),
        *device,
        *parts,
    ]


def _requests(size: int) -> str:
    return f"{size} request{'s' * (size > 1)}"


def _us(values: Sequence[float]) -> str:
    return f"{percentile(values, 50) * 1e6:,.0f} us" if values else ""


def _ratio(ours: Sequence[Steps], stock: Sequence[Steps]) -> Summary:
    return paired_ratio(*([percentile(each.whole, 50) for each in seen] for seen in (ours, stock)))


def taken(
    workers: Mapping[str, Worker], batches: Sequence[Batch], rounds: int
) -> tuple[dict[int, dict[str, list[Steps]]], list[str]]:
    """What each contender's steps of each batch took, by the batch's size, and who failed."""
    found: dict[int, dict[str, list[Steps]]] = {}
    failures: dict[str, str] = {}
    for batch in batches:
        left = {name: worker for name, worker in workers.items() if name not in failures}
        asked = {"steps": msgspec.to_builtins(batch)}
        turns = take_turns(left, asked, rounds, label=_requests(batch.requests))
        failures |= turns.failures
        found[batch.requests] = {
            name: [msgspec.convert(each, Steps) for each in seen] for name, seen in turns.answers.items()
        }
    return found, [f"{name} failed: {error}." for name, error in failures.items()]


@click.command()
@backend_option
@click.option("--shape", type=click.Choice(list(SHAPES)), help="[default: llama-8b; tiny on host]")
@click.option(
    "--batch",
    "sizes",
    multiple=True,
    type=click.IntRange(min=1),
    help="Requests. May be given several times. [default: 1, 8, 64; 2, 8 on host]",
)
@click.option("--steps", default=200, show_default=True, type=click.IntRange(min=1), help="Of a turn.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1), help="Turns of each.")
@click.option("--eager", is_flag=True, help="Without CUDA graphs and compilation.")
@click.option("--control", is_flag=True, help="Beside a second stock engine too.")
@out_option
def main(
    backend: str,
    shape: str | None,
    sizes: tuple[int, ...],
    steps: int,
    rounds: int,
    eager: bool,
    control: bool,
    out: Path | None,
) -> None:
    """A step of one model under stock vLLM and under ours, at batches of one size."""
    on_cuda = device_of(backend)[0] == "cuda"
    opening = opening_of(on_cuda, shape, eager)
    prompt, vocabulary = 256 if on_cuda else 64, SHAPES[opening.shape]["vocab_size"]
    sizes = sizes or ((1, 8, 64) if on_cuda else (2, 8))
    batches = [Batch(size, prompt, steps, vocabulary) for size in sizes]
    contenders = [STOCK, OURS, *[CONTROL] * control]
    with errors_as_messages(), started("vllm.engine_worker", contenders, backend) as workers:
        asked = {"open": msgspec.to_builtins(opening)}
        facts = ask_all(workers, asked, STARTING, label="starting the engines")
        found, failed = taken(workers, batches, rounds)
        described: dict[str, Any] = {"shape": opening.shape, "opening": msgspec.to_builtins(opening)}
        result = Result(
            "bench_step",
            command_line("vllm.bench_step", sys.argv[1:]),
            machine.facts(gpu_uuid=facts[OURS]["uuid"] if on_cuda else None),
            described | {"batches": msgspec.to_builtins(batches), "rounds": rounds},
            tables(found, failed),
            {"engines": facts, "batches": msgspec.to_builtins(found)},
        )
        publish(result, out, backend, failed)


if __name__ == "__main__":
    main()
