"""Both tenants in this process, each on a thread, in one arena."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import torch_elastic_mem as tem
from torch_elastic_mem.demo.bursts import schedule
from torch_elastic_mem.demo.device import (
    close_arena,
    equal_bits,
    give_torch,
    measure,
    open_arena,
    open_stage,
    setting_for,
)
from torch_elastic_mem.demo.pool import ArenaPool
from torch_elastic_mem.demo.serving import LocalServing
from torch_elastic_mem.demo.training import LocalTraining


class OneProcess:
    """A pair in one arena.

    Args:
        backend: "host", "cuda" or "cuda:1".
        capacity: Of the arena, in bytes; None for what suits the backend.
        seconds: Length of the elastic phase.

    Raises:
        InvalidArgument: The capacity does not suit the demo, or torch has already allocated on the GPU.
    """

    processes = 1

    def __init__(self, backend: str, capacity: int | None, seconds: float) -> None:
        _, free = measure(backend)
        self.setting = setting_for(backend, capacity, free, seconds)
        with ExitStack() as opened:
            opened.enter_context(equal_bits(backend))
            self._arena = open_arena(self.setting)
            self.device = self._arena.device
            self._stages = [open_stage(self._arena, name, self.setting) for name in ("training", "serving")]
            trained, served = self._stages
            give_torch(trained.account)
            self.training = LocalTraining(trained, seconds)
            self.serving = LocalServing(served, schedule(self.setting.scale, seconds, served.text))
            self.pool = ArenaPool(self._arena)
            self._opened = opened.pop_all()

    def __enter__(self) -> OneProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._opened:
            if kind is not None:
                self.serving.cancel()
                self.training.cancel()
                # The traceback of a failure may hold tensors; it says more than that they are in use.
                with suppress(tem.InUseError):
                    self.close()

    def close(self) -> int:
        """Closes the accounts and then the arena; returns the bytes that had not come back in between."""
        for stage in reversed(self._stages):
            stage.close()
        return close_arena(self._arena)
