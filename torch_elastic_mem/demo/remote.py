"""A tenant that runs in a process of its own, as the process that directs the demo sees it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

import torch_elastic_mem as tem
from torch_elastic_mem.demo import link as words
from torch_elastic_mem.demo.link import Link, Message
from torch_elastic_mem.demo.side import Moment, Outcome, Proof
from torch_elastic_mem.demo.worker import Progress

_PROGRAM = "torch_elastic_mem.demo.tenant_process"
_END_SECONDS = 10.0
_TAIL = 4000
_Wanted = TypeVar("_Wanted", bound=Message)


class Remote(Generic[Moment, Outcome, Proof]):
    """A side in a child process, which runs `tenant_process`. All but the listening is for one thread.

    Args:
        name: "training" or "serving".
        backend: As the child is to have it.
        folder: For what the child says besides.
        first: The moment before there is one.
        outcome: The type of its outcome. proof: And of its proof.
    """

    def __init__(
        self, name: str, backend: str, folder: Path, first: Moment, outcome: type[Outcome], proof: type[Proof]
    ) -> None:
        self.name = name
        self._moment = first
        self._outcome_type = outcome
        self._proof_type = proof
        self._outcome: Outcome | None = None
        self._running = False
        self._said = folder / f"{name}.log"
        self._heard = threading.Condition()
        self._latest: dict[type[Message], Message] = {}  # guarded by the condition, like the next
        self._gone = False
        ours, theirs = socket.socketpair()
        with theirs, self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _PROGRAM, str(theirs.fileno()), name, backend],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                cwd=Path(__file__).resolve().parents[2],  # where -m finds this package
                pass_fds=[theirs.fileno()],
                # Interrupts of the terminal are for who directs.
                start_new_session=True,
            )
        self._link = Link(ours.detach())
        # A thread, for an interrupt of the directing one must not cut a message in two.
        self._listener = threading.Thread(target=self._listen, name=f"tem-demo-{name}", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def found(self) -> words.Found:
        """Waits until the process has looked at its device."""
        return self._await(words.Found)

    def open(self, broker: str, capacity: int, seconds: float) -> None:
        """Has it open its arena; `opened` waits for that."""
        self._send(words.Open(broker, capacity, seconds))

    def opened(self) -> None:
        self._await(words.Opened)

    def play(self) -> None:
        self._begin(words.Play())

    def prove(self) -> None:
        self._begin(words.Prove())

    @property
    def running(self) -> bool:
        with self._heard:
            return self._running and words.Ended not in self._latest and not self._gone

    def check(self) -> None:
        with self._heard:
            if not self._gone:
                return
        raise self._death()

    def moment(self) -> Moment:
        with self._heard:
            look = self._latest.get(words.Look)
        if isinstance(look, words.Look):
            self._moment = msgspec.msgpack.decode(look.moment, type=type(self._moment))
        return self._moment

    def progress(self) -> list[Progress]:
        with self._heard:
            look = self._latest.get(words.Look)
        return look.progress if isinstance(look, words.Look) else []

    def finish(self) -> None:
        self._send(words.Finish())

    def cancel(self) -> None:
        """Ends the process, by force if it does not end by itself."""
        with suppress(OSError):
            self._link.send(words.Cancel())
            self._link.send(words.Close())
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._process.kill()
        self._end()

    def outcome(self) -> Outcome:
        if self._outcome is None:
            ended = self._await(words.Ended)
            self._outcome = msgspec.msgpack.decode(ended.value, type=self._outcome_type)
        return self._outcome

    def proof(self) -> Proof:
        return msgspec.msgpack.decode(self._await(words.Ended).value, type=self._proof_type)

    def close(self) -> int:
        """Has it close what it opened, and end; returns the bytes that had not come back to its arena."""
        self._send(words.Close())
        leaked = self._await(words.Closed).leaked
        self._end()
        return leaked

    def _begin(self, act: Message) -> None:
        with self._heard:
            self._latest.pop(words.Ended, None)
            self._running = True
        self._send(act)

    def _send(self, message: Message) -> None:
        try:
            self._link.send(message)
        except OSError:
            raise self._death() from None

    def _await(self, kind: type[_Wanted]) -> _Wanted:
        with self._heard:
            self._heard.wait_for(lambda: kind in self._latest or self._gone)
            message = self._latest.get(kind)
        if not isinstance(message, kind):
            raise self._death()
        return message

    def _listen(self) -> None:
        receive: Callable[[], Message] = self._link.receive
        with suppress(EOFError, OSError):
            while True:
                message = receive()
                with self._heard:
                    self._latest[type(message)] = message
                    self._heard.notify_all()
        with self._heard:
            self._gone = True
            self._heard.notify_all()

    def _end(self) -> None:
        self._process.wait()
        self._listener.join()
        self._link.close()

    def _death(self) -> tem.TemError:
        """An error with what the process has said last."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return tem.TemError(f"the process of {self.name} ({self.pid}) does not answer any more")
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        said = self._said.read_text(errors="replace")[-_TAIL:].strip() or "nothing"
        return tem.TemError(f"the process of {self.name} ({self.pid}) ended {how}; it said:\n{said}")
