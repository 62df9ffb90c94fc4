"""Contenders in processes of their own, which take turns: torch has one allocator a process.

A worker is `python -m benchmarks.MODULE CONTENDER BACKEND`. It lives through all rounds, so that starting it
is paid once and a round is short. Requests and answers are lines of JSON on its stdin and stdout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from benchmarks.contenders import environment
from benchmarks.terminal import progress

ROOT = Path(__file__).parents[1]
Request = Mapping[str, Any]
Handler = Callable[[dict[str, Any]], Any]


class WorkerError(RuntimeError):
    """A contender failed, or its process ended; says which one and what it said."""


class Worker:
    """One contender, started at once; the first answer comes when it is ready. Not thread-safe."""

    def __init__(self, module: str, contender: str, backend: str) -> None:
        self.contender = contender
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", contender, backend],
            cwd=ROOT,
            env=environment(contender),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: Request, timeout: float = 240.0) -> Any:
        """Sends a request and waits for its answer.

        Raises:
            WorkerError: it failed, or gave no answer within `timeout` seconds and was ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise WorkerError(f"{self.contender}: its process has no pipes")
        overdue = threading.Timer(timeout, self._process.kill)
        overdue.start()
        try:
            stdin.write(msgspec.json.encode(request).decode() + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            overdue.cancel()
        if not line:
            raise WorkerError(f"{self.contender}: its process ended with code {self._process.wait()}")
        answer = msgspec.json.decode(line)
        if "error" in answer:
            raise WorkerError(f"{self.contender}: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def started(module: str, contenders: Sequence[str], backend: str) -> Iterator[dict[str, Worker]]:
    """A worker for each contender, by name. All start at the same time."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Worker(module, name, backend)) for name in contenders}


def ask_all(workers: Mapping[str, Worker], request: Request, timeout: float, *, label: str) -> dict[str, Any]:
    """Asks every worker the same at once, and gives their answers by name.

    Raises:
        WorkerError: one of them failed, or was not ready within `timeout` seconds.
    """
    with progress(label, len(workers)) as advance, ThreadPoolExecutor() as threads:
        asked = {name: threads.submit(worker.ask, request, timeout) for name, worker in workers.items()}
        for each in asked.values():
            each.add_done_callback(lambda _: advance(1))
        return {name: each.result() for name, each in asked.items()}


class Turns(msgspec.Struct):
    """What workers answered, round by round, and why those that failed are missing."""

    answers: dict[str, list[Any]]
    failures: dict[str, str]


def take_turns(
    workers: Mapping[str, Worker], request: Request, rounds: int, *, label: str, warmup: int = 1
) -> Turns:
    """Asks every worker the same once a round, in order: A B C A B C. `warmup` rounds are not kept.

    A contender that fails takes no further turns, and none of its answers count.
    """
    turns = Turns({name: [] for name in workers}, {})
    with progress(label, (warmup + rounds) * len(workers)) as advance:
        for number in range(warmup + rounds):
            for name, worker in workers.items():
                advance(1)
                if name in turns.failures:
                    continue
                try:
                    answer = worker.ask(request)
                except WorkerError as error:
                    turns.failures[name] = str(error)
                    del turns.answers[name]
                    continue
                if number >= warmup:
                    turns.answers[name].append(answer)
    return turns


def serve(make: Callable[[str, str], Handler]) -> None:
    """The worker's side: answers requests until stdin ends.

    Args:
        make: called with contender and backend when the first request comes; gives what answers requests.
    """
    contender, backend = sys.argv[1:]
    # Whatever a library prints must not come between the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        handler: Handler | None = None
        for line in sys.stdin:
            try:
                if handler is None:
                    handler = make(contender, backend)
                answer = {"value": handler(msgspec.json.decode(line))}
            except Exception as error:  # noqa: BLE001 - the other side raises it
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(msgspec.json.encode(answer).decode() + "\n")
            answers.flush()
