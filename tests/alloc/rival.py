"""An account that takes memory from whoever trains in the same process."""

from __future__ import annotations

import threading
import time
import traceback
from contextlib import suppress

import torch

import torch_elastic_mem as tem

CAPACITY = 6 << 30
BURST = CAPACITY // 2


class Rival:
    """Serving that comes and goes."""

    def __init__(self, account: tem.Account) -> None:
        self.account = account
        self.bursts = self.refused = 0
        self.failure = ""
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), self.account.allocations():
                while not self._stop.is_set():
                    with self._turn:
                        self._burst()
                    time.sleep(0.01)
        except Exception:  # noqa: BLE001
            self.failure = traceback.format_exc()

    def _burst(self) -> None:
        try:
            held = [torch.full((BURST // 8,), 7, dtype=torch.uint8, device="cuda") for _ in range(8)]
        except torch.OutOfMemoryError:
            self.refused += 1
        else:
            time.sleep(0.02)
            assert all(bool((each == 7).all()) for each in held), "somebody wrote what serving held"
            self.bursts += 1
            del held
        torch.cuda.empty_cache()

    def must_take(self) -> None:
        """Leaves this thread's account with all memory and nothing in it, so that a burst takes of that."""
        cached = []
        with self._turn, suppress(torch.OutOfMemoryError):
            while True:
                cached.append(torch.empty(CAPACITY // 16, dtype=torch.uint8, device="cuda"))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
