"""A process of the soak: takes and gives memory at random until it is told to stop, or is killed.

Run by benchmarks.soak as python -m benchmarks.soak_tenant BACKEND CLASS SEED. Every line it prints is a JSON
list of what it has done so far: growths, denials, yields, and errors as texts.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading
import time

import msgspec

import torch_elastic_mem as tem

MIB = 1 << 20
EXTENT = 4 * MIB
SAY_S = 0.5
PATTERN = 64  # bytes at the start of each extent


class Tenant:
    """Memory that grows and shrinks at its end, each extent with a pattern of its owner's."""

    def __init__(self, backend: str, priority: str, seed: int) -> None:
        self._random = random.Random(seed)
        self._arena = tem.Arena(backend)
        self._account = self._arena.account(f"{priority}-{seed}", priority)
        keep = self._random.choice([0, 32 * MIB, 1 << 30])
        self._memory = self._account.range(1 << 30, keep=keep, extent=EXTENT)
        self._lock = threading.Lock()  # a reclaimer shrinks from another thread
        self._mine = bytes([seed % 255 + 1]) * PATTERN
        self._readable = self._arena.backend == "host"
        self.grown = self.denied = self.yielded = 0
        self.errors: list[str] = []
        self._account.on_reclaim(self._reclaim, self._random.choice(["evict", "spill", "pause"]))

    def step(self) -> None:
        if self._random.random() < 0.55:
            self._grow(self._random.randrange(1, 12) * EXTENT)
        else:
            with self._lock:
                self._shrink(self._random.randrange(1, 12) * EXTENT)
        time.sleep(self._random.random() * 0.01)

    def _grow(self, nbytes: int) -> None:
        # Not under the lock: the demand may make this very account yield.
        try:
            with self._lock:
                start = self._memory.mapped
                self._memory.grow(min(nbytes, (1 << 30) - start), timeout=0.2)
                for at in range(start, self._memory.mapped, EXTENT):
                    self._check(at, (bytes(PATTERN), self._mine))
                    self._write(at)
            self.grown += 1
        except tem.OutOfMemory:
            self.denied += 1

    def _shrink(self, nbytes: int) -> None:
        nbytes = min(nbytes, self._memory.mapped)
        for at in range(self._memory.mapped - nbytes, self._memory.mapped, EXTENT):
            self._check(at, (self._mine,))
        if nbytes:
            self._memory.shrink(nbytes)

    def _reclaim(self, nbytes: int, timeout: float) -> None:
        # A growth that waits has the lock: then there is nothing to give in time.
        if not self._lock.acquire(timeout=min(timeout / 2, 0.1)):
            return
        try:
            self._shrink(nbytes + -nbytes % EXTENT)
            self.yielded += 1
        finally:
            self._lock.release()

    def _check(self, at: int, allowed: tuple[bytes, ...]) -> None:
        if self._readable and ctypes.string_at(self._memory.address + at, PATTERN) not in allowed:
            self.errors.append(f"what lies at {at} is not this tenant's")

    def _write(self, at: int) -> None:
        if self._readable:
            ctypes.memmove(self._memory.address + at, self._mine, PATTERN)

    def close(self) -> None:
        self._memory.close()
        self._account.close()
        self._arena.close()


def main(backend: str, priority: str, seed: str) -> None:
    tenant = Tenant(backend, priority, int(seed))
    over = threading.Event()

    def watch() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=watch, daemon=True).start()

    def say() -> None:
        told = [tenant.grown, tenant.denied, tenant.yielded, tenant.errors]
        print(msgspec.json.encode(told).decode(), flush=True)

    due = time.monotonic()
    while not over.is_set():
        try:
            tenant.step()
        except tem.TemError as error:
            tenant.errors.append(f"{type(error).__name__}: {error}")
        if time.monotonic() >= due:
            say()
            due = time.monotonic() + SAY_S
    tenant.close()
    say()


if __name__ == "__main__":
    main(*sys.argv[1:])
