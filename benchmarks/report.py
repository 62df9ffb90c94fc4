"""Writes saved results into benchmarks/README.md, so that no figure there is typed.

Run as python -m benchmarks.report benchmarks/results.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from benchmarks.results import Result, Table, load

README = Path(__file__).parent / "README.md"
BEGIN = "<!-- results: written by `python -m benchmarks.report`, not by hand -->"
END = "<!-- end of results -->"


class ReportError(ValueError):
    """A README without its markers, or a results folder with nothing to show."""


def render(results: Sequence[Result], pictures_from: str) -> str:
    """Results as Markdown.

    Args:
        results: in the order to show them.
        pictures_from: folder of the pictures, relative to the README.
    """
    return "\n\n".join(_section(result, pictures_from) for result in results)


def _section(result: Result, pictures_from: str) -> str:
    facts = "; ".join(f"{key} {value}" for key, value in result.machine.items())
    heading = result.machine.get("gpu", "host memory")
    parts = [f"### {result.benchmark}: {heading}", f"`{result.command}`", facts]
    parts += [_table(table) for table in result.tables]
    parts += [f"![{result.benchmark}: {heading}]({pictures_from}/{name})" for name in result.pictures]
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    lines = [_line(table.columns), _line(["---", *["---:"] * (len(table.columns) - 1)])]
    lines += [_line(row) for row in table.rows]
    note = f"\n\n{table.note}" if table.note else ""
    return f"**{table.title}**\n\n" + "\n".join(lines) + note


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def insert(readme: str, rendered: str) -> str:
    """Puts `rendered` between the markers of `readme`.

    Raises:
        ReportError: a marker is missing, or they are out of order.
    """
    begin, end = readme.find(BEGIN), readme.find(END)
    if begin < 0 or end < begin:
        raise ReportError(f"the README must hold the line {BEGIN!r} and after it {END!r}")
    return f"{readme[: begin + len(BEGIN)]}\n\n{rendered}\n\n{readme[end:]}"


def read(folder: Path) -> list[Result]:
    """Results saved in `folder`, CUDA devices before the host, then by file name.

    Raises:
        ReportError: there are none, or a file is no result.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            results.append(load(path))
        except msgspec.DecodeError as error:
            raise ReportError(f"{path.name} is no benchmark result: {error}") from error
    if not results:
        raise ReportError(f"no results in {folder}")
    return sorted(results, key=lambda result: "gpu" not in result.machine)


@click.command()
@click.argument("results_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(results_dir: Path) -> None:
    """Render the results saved in RESULTS_DIR into benchmarks/README.md."""
    try:
        results = read(results_dir)
        pictures_from = Path(os.path.relpath(results_dir, README.parent)).as_posix()
        README.write_text(insert(README.read_text(), render(results, pictures_from)))
    except ReportError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{README.name}: {len(results)} results")


if __name__ == "__main__":
    main()
