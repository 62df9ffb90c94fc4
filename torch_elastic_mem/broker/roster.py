"""The processes that a broker knows, on file: the next broker waits for those that live."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from torch_elastic_mem.broker.peers import start_tick
from torch_elastic_mem.broker.session import Process

Key = tuple[int, int]  # pid, and the clock tick it started at


class Roster:
    """Written anew whenever a process comes or goes, so that a kill at any moment leaves a whole list.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[Key] = set()

    def left(self) -> set[Key]:
        """The processes that an earlier broker knew, and that live."""
        found = set()
        with contextlib.suppress(FileNotFoundError):
            for line in self._path.read_text(errors="replace").splitlines():
                # A line that is none is of no process that could come back.
                with contextlib.suppress(ValueError):
                    pid, start = map(int, line.split())
                    found.add((pid, start))
        return {key for key in found if lives(key)}

    def add(self, process: Process) -> None:
        """A process has connected."""
        self._known.add((process.pid, process.start))
        self._write()

    def discard(self, process: Process) -> None:
        """A process has ended, or holds nothing and has gone."""
        self._known.discard((process.pid, process.start))
        self._write()

    def _write(self) -> None:
        fresh = self._path.with_suffix(".new")
        # A full disk costs the next broker its patience, and nobody else anything.
        with contextlib.suppress(OSError):
            fresh.write_text("".join(f"{pid} {start}\n" for pid, start in sorted(self._known)))
            os.replace(fresh, self._path)


def lives(key: Key) -> bool:
    """Whether the process is there still, and not another of its number."""
    try:
        return start_tick(key[0]) == key[1]
    except ProcessLookupError:
        return False
