"""Three models on one device: stock vLLM with fixed shares of memory, and ours or kvcached, which share it.

Run as python -m benchmarks.vllm.bench_multi --help.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

import torch_elastic_mem as tem
from benchmarks import machine, results
from benchmarks.options import backend_option, errors_as_messages, out_option, size_option
from benchmarks.results import Result, command_line
from benchmarks.terminal import progress, publish
from benchmarks.vllm import splits
from benchmarks.vllm.engine import CONTROL, KVCACHED, OURS, STOCK, Opening
from benchmarks.vllm.fleet import Fleet, gpu_of
from benchmarks.vllm.load import Load
from benchmarks.vllm.multi_tables import tables
from benchmarks.vllm.ramps import ENGINES, PATTERNS, Run
from benchmarks.vllm.shapes import SHAPES, token_bytes
from benchmarks.worker import WorkerError
from torch_elastic_mem.device import device_of

MIB, GIB = 1 << 20, 1 << 30
# What a cache comes in: whole chunks of ours.
UNIT = 8 * MIB
# An engine that is behind has so long after the last arrival, or it is taken for stuck.
DRAIN = 240.0


class Settings(msgspec.Struct, frozen=True):
    """What results must have in common to stand in one table."""

    shape: str
    total: int
    seconds: float
    rounds: int
    prompt: int
    output: int


class Plan:
    """What is to be served, and out of what."""

    def __init__(
        self, settings: Settings, patterns: Sequence[str], peaks: Sequence[float], kind: str
    ) -> None:
        self.settings = settings
        self.runs = [
            Run(pattern, peak, number)
            for number in range(1, settings.rounds + 1)
            for pattern in patterns
            for peak in peaks
        ]
        self._kind = kind
        self.on_cuda = kind == "cuda"

    def ramps(self, run: Run) -> list[Any]:
        """Each engine's part of a run."""
        given = self.settings
        return run.ramps(given.seconds, given.prompt, given.output, SHAPES[given.shape]["vocab_size"])

    def split(self, wanted: str) -> tuple[list[int], str]:
        """Bytes for each engine, and how they were come by: "equal", "searched", or parts such as "2:3:2"."""
        given = self.settings
        parts: Sequence[int] = [1] * ENGINES
        said = "equal shares"
        if wanted == "searched":
            slots = given.total // (token_bytes(given.shape) * (given.prompt + given.output))
            loads = [[ramp.times() for ramp in self.ramps(run)] for run in self.runs]
            parts, score, equal = splits.best(loads, slots, given.output, splits.PACES[self._kind])
            said = (
                f"searched over a model of the loads, which sees a TTFT p99 of {score * 1e3:,.0f} ms "
                f"on average, and of {equal * 1e3:,.0f} ms with equal shares"
            )
        elif wanted != "equal":
            parts = [int(part) for part in wanted.split(":")]
            said = "given"
        return [given.total * part // sum(parts) // UNIT * UNIT for part in parts], said

    def timeout(self, run: Run) -> float:
        """Seconds after which an engine is taken for stuck."""
        return run.seconds(self.settings.seconds) + DRAIN


def serve(fleet: Fleet, plan: Plan, name: str) -> tuple[dict[str, list[Any]], str]:
    """Starts a contender's engines, has them serve all runs, and says what ended it early.

    Returns:
        By what was served, an answer for each engine and round.
    """
    found: dict[str, list[Any]] = {}
    given = plan.settings
    warm = Load(
        0.0, 48 if plan.on_cuda else 4, given.prompt, given.output, 7, SHAPES[given.shape]["vocab_size"]
    )
    try:
        with fleet, progress(f"serving, {name}", len(plan.runs)) as advance:
            fleet.warm_up(warm)
            for run in plan.runs:
                served = fleet.serve(plan.ramps(run), plan.timeout(run))
                found.setdefault(str(run), []).extend(served)
                advance(1)
    except WorkerError as error:
        return found, f"{name} failed: {error}."
    return found, ""


def merged(parts: Sequence[Result], settings: Settings) -> tuple[dict[str, dict[str, list[Any]]], list[str]]:
    """The runs of several results, by what was served and by contender, and their notes.

    Raises:
        click.UsageError: one was made with other settings.
    """
    runs: dict[str, dict[str, list[Any]]] = {}
    notes: list[str] = []
    for part in parts:
        if part.settings != msgspec.to_builtins(settings):
            raise click.UsageError(f"{part.command} was run with other settings: {part.settings}")
        for what, answers in part.raw["runs"].items():
            runs.setdefault(what, {}).update(answers)
        notes += [note for note in part.raw["notes"] if note not in notes]
    return runs, notes


def _split(_context: click.Context, _option: click.Parameter, value: str) -> str:
    parts = value.split(":")
    if value not in ("equal", "searched") and not (
        len(parts) == ENGINES and all(part.isdecimal() and int(part) for part in parts)
    ):
        raise click.BadParameter(f"{value!r} is neither 'equal' nor 'searched' nor parts such as 2:3:2")
    return value


def _listed(kind: Callable[[str], Any]) -> Any:
    def parse(_context: click.Context, option: click.Parameter, value: str | None) -> list[Any] | None:
        try:
            return None if value is None else [kind(each) for each in value.split(",")]
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is no list: {error}") from error

    return parse


def _pattern(name: str) -> str:
    if name not in PATTERNS:
        raise ValueError(f"there are {', '.join(PATTERNS)}")
    return name


@click.command()
@backend_option
@click.option("--shape", type=click.Choice(list(SHAPES)), help="[default: llama-8b; tiny on host]")
@click.option(
    "--contender",
    "contenders",
    multiple=True,
    type=click.Choice([STOCK, CONTROL, KVCACHED, OURS]),
    help="May be given several times. 'stock, again' tells how far two of one kind are apart. "
    "[default: stock and ours, one after the other; none beside --with]",
)
@click.option(
    "--split",
    "wanted",
    multiple=True,
    default=["searched"],
    show_default=True,
    callback=lambda context, option, values: [_split(context, option, value) for value in values],
    help="Stock's shares: equal, searched, or parts such as 2:3:2. Each starts engines of its own.",
)
@click.option("--patterns", callback=_listed(_pattern), help="[default: staggered,overlapping]")
@click.option(
    "--peaks", callback=_listed(float), help="Requests a second. [default: 8,12,16,24; 2,6 on host]"
)
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), help="Of a ramp. [default: 24; 6 on host]"
)
@click.option("--rounds", default=1, show_default=True, type=click.IntRange(min=1), help="Of all of it.")
@size_option("--kv", "Bytes of the three caches together. [default: 21GiB; 48MiB on host]")
@click.option("--eager", is_flag=True, help="Without CUDA graphs and compilation.")
@click.option(
    "--with",
    "others",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A result of an earlier command, whose runs stand beside this one's.",
)
@out_option
def main(
    backend: str,
    shape: str | None,
    contenders: tuple[str, ...],
    wanted: list[str],
    patterns: list[str] | None,
    peaks: list[float] | None,
    seconds: float | None,
    rounds: int,
    kv: int | None,
    eager: bool,
    others: tuple[Path, ...],
    out: Path | None,
) -> None:
    """Three models whose load peaks one after the other: fixed shares of the memory against one arena."""
    kind = device_of(backend)[0]
    on_cuda = kind == "cuda"
    settings = Settings(
        shape or ("llama-8b" if on_cuda else "tiny"),
        kv or (21 * GIB if on_cuda else 48 * MIB),
        seconds or (24.0 if on_cuda else 6.0),
        rounds,
        *((256, 256) if on_cuda else (64, 64)),
    )
    opening = (
        Opening(settings.shape, 0, 4096, eager, batched_tokens=2048, seqs=384)
        if on_cuda
        else Opening(settings.shape, 0, 1024, eager=True, batched_tokens=512, seqs=96, block_size=32)
    )
    plan = Plan(
        settings,
        patterns or ["staggered", "overlapping"],
        peaks or ([8.0, 12.0, 16.0, 24.0] if on_cuda else [2.0, 6.0]),
        kind,
    )
    parts = [results.load(path) for path in others]
    runs, notes = merged(parts, settings)
    failures: list[str] = []
    facts: dict[str, Any] = {}
    uuid: str | None = None
    with errors_as_messages():
        contenders = contenders or (() if others else (STOCK, OURS))
        for contender, name, split, said in _fleets(plan, contenders, wanted):
            if said not in notes:
                notes.append(said)
            uuid = uuid or gpu_of(backend)
            fleet = Fleet(contender, backend, opening, split, settings.total)
            found, failure = serve(fleet, plan, name)
            facts[name] = fleet.facts
            for what, answers in found.items():
                runs.setdefault(what, {})[name] = answers
            failures += [failure] if failure else []
    command = command_line("vllm.bench_multi", sys.argv[1:])
    result = Result(
        "bench_multi",
        "; ".join([*(part.command for part in parts), *([command] if facts else [])]),
        machine.facts(gpu_uuid=uuid) if facts else parts[0].machine,
        msgspec.to_builtins(settings),
        tables(runs, ENGINES, rounds, " ".join([*notes, *failures])),
        {"engines": facts, "runs": runs, "notes": [*notes, *failures]},
    )
    publish(result, out, backend, failures)


def _fleets(
    plan: Plan, contenders: Sequence[str], wanted: Sequence[str]
) -> list[tuple[str, str, list[int] | None, str]]:
    """Each contender, the name of its rows, its split if it has one, and what is said of it."""
    found: list[tuple[str, str, list[int] | None, str]] = []
    for stock in [each for each in (STOCK, CONTROL) if each in contenders]:
        for each in wanted:
            split, said = plan.split(each)
            unit, word = (GIB, "GiB") if plan.on_cuda else (MIB, "MiB")
            name = f"{stock} {':'.join(f'{size / unit:.3g}' for size in split)} {word}"
            if name not in [other[1] for other in found]:
                found.append((STOCK, name, split, f"{name}: {said}."))
    shared = tem.format_bytes(plan.settings.total)
    if KVCACHED in contenders:
        said = f"{KVCACHED}: {shared} that its engines find free on the device; they have vLLM's V1 runner."
        found.append((KVCACHED, KVCACHED, None, said))
    if OURS in contenders:
        said = f"{OURS}: {shared} that a broker shares out among equals."
        found.append((OURS, OURS, None, said))
    return found


if __name__ == "__main__":
    main()
