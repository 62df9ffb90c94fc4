"""Runs every check of the repository, one line a step, and ends at the first that fails.

python tools/check.py                     what `make test` and CI run
python tools/check.py --only lint,types   some of the steps, in the order of the list
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from checks import BESIDE, ON_REQUEST, STEPS
from checks.shell import Failed, Skipped, end_programs, give_way
from rich.console import Console
from rich.markup import escape


class Steps:
    """The steps of one run, in two lanes: those that build at length give way to those that test.

    Args:
        names: which.
        excused: of them, those that are only named.
        console: where each has its line.
    """

    def __init__(self, names: list[str], excused: Collection[str], console: Console) -> None:
        self._names = names
        self._excused = excused
        self._console = console
        self._failed = threading.Event()
        self._done: set[str] = set()

    def run(self) -> int:
        """Returns an exit code."""
        lanes = (
            [name for name in self._names if name not in BESIDE],
            [name for name in self._names if name in BESIDE],
        )
        with ThreadPoolExecutor(1, initializer=give_way) as beside:
            other = beside.submit(self._lane, lanes[1])
            try:
                self._lane(lanes[0])
            except BaseException:
                self._failed.set()
                end_programs()
                raise
            other.result()
        if not self._failed.is_set():
            return 0
        if left := ", ".join(name for name in self._names if name not in self._done):
            self._console.print(f"[red]not run: {left}[/]", highlight=False)
        return 1

    def _lane(self, names: list[str]) -> None:
        for name in names:
            if not self._failed.is_set():
                self._step(name)

    def _step(self, name: str) -> None:
        started = time.monotonic()
        shown = self._console.is_terminal and name not in BESIDE
        try:
            if name in self._excused:
                raise Skipped(f"{ON_REQUEST[name]}; run it with --only {name}")
            with self._console.status(name) if shown else nullcontext():
                said = STEPS[name]()
            verdict = "[green]ok  [/]"
        except Skipped as reason:
            verdict, said = "[yellow]skip[/]", str(reason)
        except Failed as failure:
            if self._failed.is_set():
                return  # ended because of another
            self._failed.set()
            end_programs()
            verdict, said = "[red]FAIL[/]", str(failure)
        self._done.add(name)
        row = f"{verdict} {name:{max(map(len, STEPS))}} {time.monotonic() - started:7.1f} s"
        self._console.print(f"{row}  {escape(said)}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the checks of the repository.")
    parser.add_argument("--only", metavar="STEP[,STEP]", help=f"of {', '.join(STEPS)}")
    wanted = parser.parse_args().only
    names = wanted.split(",") if wanted else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(STEPS)}")
    in_ci = bool(os.environ.get("CI"))
    console = Console(soft_wrap=True, force_terminal=False if in_ci else None)
    excused = () if wanted or in_ci else ON_REQUEST
    return Steps([name for name in STEPS if name in names], excused, console).run()


if __name__ == "__main__":
    sys.exit(main())
