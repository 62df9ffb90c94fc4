"""How long the package and its command take to start: python -m benchmarks.bench_import --help."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from benchmarks import machine
from benchmarks.options import out_option
from benchmarks.results import TARGET_COLUMNS, Result, Table, command_line, target_row
from benchmarks.terminal import publish
from benchmarks.timing import interleave, summarise

IMPORT_TARGET_MS = 100
HELP_TARGET_MS = 150

# Timed inside the interpreter, so that its own start does not count; exits with an error if torch came along.
_IMPORT = """
import sys, time
start = time.perf_counter_ns()
import torch_elastic_mem
spent = time.perf_counter_ns() - start
sys.exit("importing torch_elastic_mem imported torch") if "torch" in sys.modules else print(spent)
"""


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"{' '.join(command[:3])} failed: {done.stderr.strip()}")
    return done.stdout


def measure(rounds: int) -> dict[str, list[float]]:
    """Nanoseconds of `rounds` runs each: the import, `tem --help`, and a bare interpreter to compare with.

    Raises:
        click.ClickException: a command failed, or the import brought torch along.
    """
    tem = Path(sys.executable).with_name("tem")
    if not tem.exists():
        raise click.ClickException(f"no `tem` command beside {sys.executable}: install the package first")

    def wall(command: Sequence[str]) -> float:
        start = time.perf_counter_ns()
        _output(command)
        return time.perf_counter_ns() - start

    return interleave(
        {
            "python": lambda: wall([sys.executable, "-c", "pass"]),
            "import": lambda: float(_output([sys.executable, "-c", _IMPORT])),
            "help": lambda: wall([str(tem), "--help"]),
        },
        rounds,
        label="starting interpreters",
        warmup=1,
    )


def tables(raw: Mapping[str, Sequence[float]]) -> list[Table]:
    """Start-up times beside their targets."""
    imported = summarise(raw["import"]).median / 1e6
    helped = summarise(raw["help"]).median / 1e6
    bare = summarise(raw["python"]).median / 1e6
    return [
        Table(
            "Start-up",
            TARGET_COLUMNS,
            [
                target_row(
                    "import torch_elastic_mem, torch not imported",
                    f"{imported:.0f} ms",
                    f"under {IMPORT_TARGET_MS} ms",
                    imported < IMPORT_TARGET_MS,
                ),
                target_row(
                    "tem --help, whole process",
                    f"{helped:.0f} ms",
                    f"under {HELP_TARGET_MS} ms",
                    helped < HELP_TARGET_MS,
                ),
            ],
            f"Medians of {len(raw['import'])} runs. A bare interpreter takes {bare:.0f} ms to start and end.",
        )
    ]


@click.command()
@click.option(
    "--rounds", type=click.IntRange(2), default=15, show_default=True, help="Processes started of each kind."
)
@out_option
def main(rounds: int, out: Path | None) -> None:
    """Time the import of the package without torch, and `tem --help`."""
    raw = measure(rounds)
    result = Result(
        benchmark="bench_import",
        command=command_line("bench_import", sys.argv[1:]),
        machine=machine.facts(),
        settings={"rounds": rounds},
        tables=tables(raw),
        raw=dict(raw),
    )
    publish(result, out, "host")


if __name__ == "__main__":
    main()
