"""Runs every check of the repository, one line a step, and stops at the first that fails.

python tools/check.py                     what `make test` and CI run
python tools/check.py --only lint,types   some of the steps, in the order of the list
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Collection
from contextlib import nullcontext

from checks import ON_REQUEST, STEPS
from checks.shell import Failed, Skipped
from rich.console import Console
from rich.markup import escape


def run(names: list[str], excused: Collection[str], console: Console) -> int:
    """Runs the steps named but not excused, prints what they say, and returns an exit code."""
    width = max(map(len, STEPS))
    for position, name in enumerate(names):
        started = time.monotonic()
        try:
            if name in excused:
                raise Skipped(f"{ON_REQUEST[name]}; run it with --only {name}")
            with console.status(name) if console.is_terminal else nullcontext():
                said = STEPS[name]()
            verdict = "[green]ok  [/]"
        except Skipped as reason:
            verdict, said = "[yellow]skip[/]", str(reason)
        except Failed as failure:
            verdict, said = "[red]FAIL[/]", str(failure)
        row = f"{verdict} {name:{width}} {time.monotonic() - started:7.1f} s"
        console.print(f"{row}  {escape(said)}", highlight=False)
        if "FAIL" in verdict:
            left = ", ".join(names[position + 1 :])
            console.print(f"[red]{name} failed[/]" + (f"; not run: {left}" if left else ""), highlight=False)
            return 1
    return 0


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
    return run([name for name in STEPS if name in names], excused, console)


if __name__ == "__main__":
    sys.exit(main())
