"""A benchmark's result: what was run, where, the tables it printed and the readings they were made from.

The tables are kept as text, so that the terminal, the JSON file and README.md show the same figures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

RESULTS_DIR = Path(__file__).parent / "results"


class Table(msgspec.Struct):
    """One table: `rows` are as long as `columns`, and the first column says what a row is."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


class Result(msgspec.Struct):
    """One run of one benchmark."""

    benchmark: str
    command: str
    machine: dict[str, str]
    settings: dict[str, Any]
    tables: list[Table]
    raw: dict[str, Any]
    pictures: list[str] = []


def target_row(what: str, measured: str, target: str, met: bool) -> list[str]:
    """A row of a table of targets: what, the reading, what was to be reached, and whether it was."""
    return [what, measured, target, "yes" if met else "NO"]


TARGET_COLUMNS = ["what", "measured", "target", "met"]


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command that makes a result again, without the folders of the machine it ran on."""
    words = [re.sub(r"^(--[a-z-]+=)?.*/", r"\1", word) for word in arguments]
    return " ".join(["python -m", f"benchmarks.{module}", *words])


def default_path(benchmark: str, backend: str) -> Path:
    """Where a result goes when the caller named no file: results/bench_map-cuda.json."""
    return RESULTS_DIR / f"{benchmark}-{backend.replace(':', '')}.json"


def save(result: Result, path: Path) -> None:
    """Writes a result as indented JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def load(path: Path) -> Result:
    """Reads what save() wrote; msgspec.ValidationError when the file is something else."""
    return msgspec.json.decode(path.read_bytes(), type=Result)
