"""A client of the broker in C++, built when it is first asked for: demands, timed without an interpreter."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmarks.compiler import program
from benchmarks.worker import WorkerError

_SOURCES = Path(__file__).parent
_CSRC = _SOURCES.parents[1] / "csrc"
_PARTS = [
    _CSRC / name
    for name in ("client/connection.cpp", "client/wire.cpp", "core/fd_message.cpp", "core/fork.cpp")
]
_SIZE = 2 << 20


class Load(msgspec.Struct, frozen=True):
    """Who is connected, and what they do.

    Attributes:
        idle: connections that say nothing. busy: connections that demand and return for ever.
        pause: microseconds that a busy one rests after each; 0 for none.
        gap: microseconds between the demands that are timed.
    """

    idle: int = 200
    busy: int = 0
    pause: int = 0
    gap: int = 0


class Named(msgspec.Struct, frozen=True):
    """A device, as the clients name it; it is not touched.

    Attributes:
        uuid: its UUID, or "HOST". total: its bytes.
    """

    uuid: str = "HOST"
    total: int = 64 << 30


class Figures(msgspec.Struct):
    """What was seen: nanoseconds of each timed demand, seconds of all, and the others' demands a second."""

    readings: list[float]
    seconds: float = 0.0
    others: float = 0.0


def demands(
    socket: str,
    load: Load,
    rounds: int,
    meanwhile: Callable[[], object] | None = None,
    *,
    device: Named | None = None,
) -> Figures:
    """Times demands that what is free covers, each followed by a return.

    Args:
        socket: the broker's.
        load: beside what.
        rounds: how many.
        meanwhile: called when they are done and all connections are still there.
        device: what the memory is of; the host's by default.

    Raises:
        BuildError: the client does not build. WorkerError: a demand was not granted.
    """
    device = device or Named()
    counts = [device.total, load.idle, load.busy, load.pause, _SIZE, rounds, load.gap]
    return _run([socket, device.uuid, *map(str, counts)], meanwhile)


def echo(rounds: int) -> Figures:
    """The floor: messages of the same size through the same kind of socket, answered at once."""
    return _run(["echo", str(rounds)], None)


def _run(arguments: Sequence[str], meanwhile: Callable[[], object] | None) -> Figures:
    client = program(
        "broker_client",
        [_SOURCES / "client.cpp", *_PARTS],
        ["-std=c++17", f"-I{_CSRC}"],
        headers=[*sorted((_CSRC / "client").glob("*.hpp")), *sorted((_CSRC / "core").glob("*.hpp"))],
    )
    figures = Figures([])
    process = subprocess.Popen(
        [str(client), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdin is not None and process.stderr is not None
        for line in process.stdout:
            word, _, value = line.rpartition(" ")
            if not word:
                figures.readings.append(float(value))
            elif word == "busy":
                figures.others = float(value)
            else:
                figures.seconds = float(value)
                if meanwhile is not None:
                    meanwhile()
                process.stdin.close()
        said = process.stderr.read().strip()
        if process.wait() != 0:
            raise WorkerError(f"the client of the broker failed: {said}")
    return figures
