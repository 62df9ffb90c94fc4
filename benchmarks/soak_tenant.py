"""A process of the soak: takes and gives at random, and looks whether its bytes are its own.

python -m benchmarks.soak_tenant BACKEND SOCKET NUMBER BYTES. Writes a line of JSON now and then, and ends
when its stdin does.
"""

from __future__ import annotations

import random
import sys
import threading
import time
import traceback
from contextlib import suppress

import msgspec

import torch_elastic_mem as tem
from benchmarks.patterns import Pattern, pattern_on

MIB = 1 << 20
UNIT = 2 * MIB
CLASSES = ["idle", "training", "serving", "critical"]
RUNGS = ["evict", "spill", "shrink", "pause"]
RANGES = 3
_REPORT_SECONDS = 0.25
_GROW_SECONDS = 0.3
_CONNECT_SECONDS = 20.0


class Report(msgspec.Struct):
    """What a tenant has done so far.

    Attributes:
        steps: growths and shrinkings. denied: growths that were refused. checked: bytes looked at.
        given: bytes that its reclaimers gave. error: what went wrong, and ended it. ended: it has given all
            back and closed.
    """

    number: int
    steps: int = 0
    denied: int = 0
    checked: int = 0
    given: int = 0
    error: str = ""
    ended: bool = False


class Piece:
    """A range, full of one byte. Whoever changes it has its lock."""

    def __init__(self, account: tem.Account, pattern: Pattern, nbytes: int, keep: int, byte: int) -> None:
        self.lock = threading.Lock()
        self._memory = account.range(nbytes, keep=keep)
        self._pattern = pattern
        self._nbytes = nbytes
        self._byte = byte

    @property
    def room(self) -> int:
        """Bytes of addresses without memory."""
        return self._nbytes - self._memory.mapped

    @property
    def held(self) -> int:
        """Bytes with memory."""
        return self._memory.mapped

    def grow(self, nbytes: int) -> int:
        """Takes memory and writes to it. What was idle here may still be as it was; else it is zeros."""
        at = self._memory.address + self._memory.mapped
        self._memory.grow(nbytes, timeout=_GROW_SECONDS)
        self._expect(at, nbytes, (0, self._byte))
        self._pattern.fill(at, nbytes, self._byte)
        return nbytes

    def shrink(self, nbytes: int) -> int:
        """Gives memory back, if it is still as it was written."""
        self._expect(self._memory.address + self._memory.mapped - nbytes, nbytes, (self._byte,))
        self._memory.shrink(nbytes)
        return nbytes

    def close(self) -> int:
        """Gives all back."""
        with self.lock:
            held = self.held
            if held:
                self.shrink(held)
            self._memory.close()
        return held

    def _expect(self, address: int, nbytes: int, bytes_: tuple[int, ...]) -> None:
        for at in range(address, address + nbytes, UNIT):
            found = self._pattern.found(at, UNIT)
            if found not in bytes_:
                seen = "bytes of several kinds" if found is None else f"byte {found}"
                raise AssertionError(f"{seen} at {at - self._memory.address} of {nbytes}, not {bytes_}")


class Tenant:
    """Steps at random until it is told to end."""

    def __init__(self, backend: str, path: str, number: int, nbytes: int) -> None:
        self.report = Report(number)
        self.stop = threading.Event()
        self._random = random.Random(number)
        self._arena = _connected(backend, path)
        self._account = self._arena.account(f"soak {number}", CLASSES[number % len(CLASSES)])
        pattern = pattern_on(self._arena)
        part = nbytes // RANGES // UNIT * UNIT
        self._pieces = [
            Piece(
                self._account,
                pattern,
                part,
                self._random.choice([0, 0, part // 2, part]),
                1 + self._random.randrange(255),
            )
            for _ in range(RANGES)
        ]
        rungs = [rung for rung in RUNGS if self._random.random() < 0.6]
        self._reclaimers = [self._account.on_reclaim(self._reclaim, rung) for rung in rungs]

    def run(self) -> None:
        """Steps, says how it goes, and leaves nothing behind."""
        said = 0.0
        while not self.stop.is_set():
            self._step()
            if time.monotonic() - said > _REPORT_SECONDS:
                said = time.monotonic()
                say(self.report)
            self.stop.wait(self._random.random() * 0.02)
        for reclaimer in self._reclaimers:
            reclaimer.remove()
        for piece in self._pieces:
            self.report.checked += piece.close()
        self._account.close()
        self._arena.close()
        self.report.ended = True

    def _step(self) -> None:
        piece = self._random.choice(self._pieces)
        self.report.steps += 1
        with piece.lock:
            # More often up than down: what is free is gone soon, and everybody wants more.
            if piece.room and self._random.random() < 0.6:
                try:
                    self.report.checked += piece.grow(self._some(piece.room))
                except tem.OutOfMemory:
                    self.report.denied += 1
            elif piece.held:
                self.report.checked += piece.shrink(self._some(piece.held))

    def _some(self, most: int) -> int:
        return UNIT * self._random.randint(1, most // UNIT)

    def _reclaim(self, nbytes: int, timeout: float) -> None:
        try:
            left = nbytes
            for piece in self._pieces:
                # One that grows may wait for others, who must not wait for it.
                if left <= 0 or not piece.lock.acquire(blocking=False):
                    continue
                try:
                    if most := min(piece.held, -(-left // UNIT) * UNIT):
                        left -= piece.shrink(most)
                        self.report.given += most
                finally:
                    piece.lock.release()
        except BaseException as error:  # noqa: BLE001 - a reclaimer's error ends nobody's demand
            self.report.error = f"a reclaimer: {type(error).__name__}: {error}"
            self.stop.set()


def _connected(backend: str, path: str) -> tem.Arena:
    """An arena under a broker, which may just be starting anew."""
    end = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            return tem.Arena(backend, broker=path)
        except tem.BrokerError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)


def say(report: Report) -> None:
    """A line for whoever started this."""
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    sys.stdout.flush()


def main() -> None:
    """Runs a tenant, and says how it ended."""
    backend, path, number, nbytes = sys.argv[1:]
    report = Report(int(number))
    try:
        tenant = Tenant(backend, path, int(number), int(nbytes))
        report = tenant.report

        def wait_for_the_end() -> None:
            sys.stdin.read()
            tenant.stop.set()

        threading.Thread(target=wait_for_the_end, daemon=True).start()
        tenant.run()
    except BaseException as error:  # noqa: BLE001 - said, and counted as wrong
        traceback.print_exc()
        report.error = report.error or f"{type(error).__name__}: {error}"
    with suppress(BrokenPipeError):
        say(report)


if __name__ == "__main__":
    main()
