"""The line between an engine's scheduler and each of its ranks, and what is said on it.

vLLM's own queues bring steps, one after the other, and are silent while an engine is idle; memory is wanted
at any time. So there is a socket a rank beside them. It lies in a directory that nobody else may enter, and
both ends are one user's, as those of vLLM's queues are: messages are pickled.
"""

from __future__ import annotations

import pickle
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Where the ranks find their scheduler; they are its children.
PLACE = "TEM_VLLM_RANKS"


@dataclass(frozen=True, slots=True)
class Hello:
    """Rank: what its cache is like; no blocks where it cannot be elastic."""

    rank: int
    num_blocks: int
    chunk_blocks: int
    apart: bool  # neighbouring chunks share no extent, nor do those that are so many times as large


@dataclass(frozen=True, slots=True)
class Welcome:
    """Scheduler: the chunks of all ranks; no blocks if one of them cannot be elastic."""

    chunk_blocks: int
    group: str
    members: int


@dataclass(frozen=True, slots=True)
class Grow:
    """Scheduler: put memory under these chunks. It is answered by `Grown`."""

    number: int
    chunks: list[int]
    rung: str
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Grown:
    """Rank: they have memory, or why not."""

    number: int
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Release:
    """Scheduler: let the memory of these chunks go, behind the work of this step and those before.

    Attributes:
        yielded: how many of them count for who is owed some.
    """

    chunks: list[int]
    step: int
    yielded: int


@dataclass(frozen=True, slots=True)
class Undo:
    """Scheduler: give back what this growth has brought, or is going to bring. No step has seen it."""

    number: int


@dataclass(frozen=True, slots=True)
class Listen:
    """Scheduler: demands on the rank's account go to it from now on, up to this rung."""

    rung: str


@dataclass(frozen=True, slots=True)
class Demand:
    """Rank: give up chunks until so many have been, since the beginning. It is answered by `Served`."""

    number: int
    rung: str
    target: int
    timeout: float
    own: bool  # for a growth of this engine


@dataclass(frozen=True, slots=True)
class Served:
    """Scheduler: all that is given for this demand has been said before."""

    number: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """Scheduler: what is in the engine's blocks, for people to look at."""

    in_use: int
    cached: int
    free: int
    parked: int


Message = Hello | Welcome | Grow | Grown | Undo | Release | Listen | Demand | Served | Blocks


class Line:
    """One end. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Says something. If nobody is left to hear it, nothing happens: whoever receives learns of that."""
        with self._sending, suppress(OSError):
            self._socket.sendall(pickle.dumps(message))

    def receive(self) -> Message:
        """What the other end says next.

        Raises:
            EOFError: it, or this one, has ended.
        """
        try:
            message: Message = pickle.load(self._file)
            return message
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as reason:
            raise EOFError("the line between the scheduler and a rank has ended") from reason

    def messages(self) -> Iterator[Message]:
        """All that it says, until it ends."""
        with suppress(EOFError):
            while True:
                yield self.receive()

    def close(self) -> None:
        """Ends the line, and with it a `receive`. Harmless the second time."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Door:
    """Where the ranks of one engine call."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tem-ranks-"))
        self.path = self._folder / "s"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self.path))
        self._socket.listen(128)

    def accept(self) -> Line:
        """The next that calls.

        Raises:
            OSError: the door has been closed.
        """
        return Line(self._socket.accept()[0])

    def close(self) -> None:
        """Nobody else is let in. Harmless the second time."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def call(path: str) -> Line:
    """A rank's line to its scheduler.

    Raises:
        OSError: there is none.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    return Line(connection)
