"""The floor between processes: one unmaps and releases, another creates and maps, told by a bare socket."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType

from benchmarks.compiler import BuildError, program
from benchmarks.floor import FloorError
from torch_elastic_mem.device import device_of

_SOURCES = Path(__file__).parent
_CSRC = _SOURCES.parents[1] / "csrc"


class HandoverFloor:
    """A holder and a taker of `size` bytes in extents of `extent` bytes; at first neither has any.

    Every call returns nanoseconds, timed in C++. Not thread-safe.

    Raises:
        FloorError: no compiler, no driver, or a driver call that failed.
    """

    def __init__(self, device: str, size: int, extent: int) -> None:
        kind, index = device_of(device)
        command = [str(_built()), str(-1 if kind == "host" else index), str(size), str(extent)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def take(self) -> int:
        """To the taker from the holder: from the asking until the memory is accessible."""
        return self._timed("take")

    def create(self) -> int:
        """To the taker from the device, which must have it free."""
        return self._timed("create")

    def give(self) -> int:
        """The taker gives up what it has."""
        return self._timed("give")

    def hold(self) -> int:
        """The holder takes it."""
        return self._timed("hold")

    def close(self) -> None:
        """Ends both."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> HandoverFloor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _timed(self, word: str) -> int:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise FloorError("the floor's process has no pipes")
        try:
            stdin.write(word + "\n")
            answer = stdout.readline().strip()
        except BrokenPipeError:
            answer = ""
        if not answer.isdigit():
            raise FloorError(answer.removeprefix("error ") or "the floor's process has ended")
        return int(answer)


def _built() -> Path:
    try:
        return program(
            "handover",
            [_SOURCES / "handover.cpp"],
            ["-std=c++17", f"-I{_CSRC}"],
            ["-ldl"],
            headers=[*sorted(_SOURCES.glob("*.hpp")), _CSRC / "backend" / "cuda_abi.hpp"],
        )
    except BuildError as error:
        raise FloorError(str(error)) from error
