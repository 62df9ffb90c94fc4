"""The soak's tenants, and what befalls them: they are killed, stopped, and follow one another."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import TracebackType

import msgspec

from benchmarks.soak_tenant import Report
from benchmarks.worker import ROOT

_END_SECONDS = 60.0


class Member:
    """A tenant's process, and the last that it said."""

    def __init__(self, backend: str, path: str, number: int, nbytes: int) -> None:
        self.report = Report(number)
        self.stopped_until = 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak_tenant", backend, path, str(number), str(nbytes)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def end(self) -> None:
        """Has it give all back and end."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Waits until it has ended, or kills it."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.report.error = self.report.error or "it did not end"
            self.process.kill()
            self.process.wait()
        self.end()
        self._listener.join()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                # A process that is killed may leave half a line.
                if line.endswith("\n"):
                    self.report = msgspec.json.decode(line, type=Report)


class Crowd:
    """So many tenants at any time.

    Args:
        backend: theirs.
        path: of the broker's socket.
        size: how many.
        nbytes: what each would take if it could.
        chance: decides whom it hits.
    """

    def __init__(self, backend: str, path: str, size: int, nbytes: int, chance: random.Random) -> None:
        self._make = partial(Member, backend, path, nbytes=nbytes)
        self._numbers = itertools.count(1)
        self._chance = chance
        self._gone: list[Report] = []
        self.kills = self.stops = 0
        self.members = [self._make(next(self._numbers)) for _ in range(size)]

    @property
    def reports(self) -> list[Report]:
        """Of those that are there and those that were."""
        return [*self._gone, *(member.report for member in self.members)]

    @property
    def errors(self) -> list[str]:
        """What went wrong with them."""
        return [f"tenant {report.number}: {report.error}" for report in self.reports if report.error]

    @property
    def stopped(self) -> bool:
        """Whether one of them stands still."""
        return any(member.stopped_until for member in self.members)

    def kill_one(self) -> None:
        """Ends a tenant without a warning; another takes its place."""
        member = self._chance.choice(self.members)
        member.process.kill()
        self._replace(member)
        self.kills += 1

    def stop_one(self, seconds: float) -> None:
        """Lets a tenant stand still for a while."""
        member = self._chance.choice([each for each in self.members if not each.stopped_until])
        member.process.send_signal(signal.SIGSTOP)
        member.stopped_until = time.monotonic() + seconds
        self.stops += 1

    def tend(self) -> None:
        """Lets go on who has stood still long enough, and replaces who has ended of itself."""
        for member in list(self.members):
            if member.stopped_until and time.monotonic() >= member.stopped_until:
                member.process.send_signal(signal.SIGCONT)
                member.stopped_until = 0.0
            if member.process.poll() is not None:
                member.report.error = member.report.error or f"ended with code {member.process.returncode}"
                self._replace(member)

    def end(self) -> None:
        """All give back what they have, and end."""
        for member in self.members:
            member.process.send_signal(signal.SIGCONT)
            member.end()
        end = time.monotonic() + _END_SECONDS
        for member in self.members:
            member.wait(end - time.monotonic())
            if not member.report.ended and not member.report.error:
                member.report.error = "ended before it had given all back"

    def __enter__(self) -> Crowd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            if member.process.poll() is None:
                member.process.kill()
            member.wait(10)

    def _replace(self, member: Member) -> None:
        member.wait(10)
        self._gone.append(member.report)
        self.members[self.members.index(member)] = self._make(next(self._numbers))
