"""One contender of bench_alloc: times its cases when asked."""

from __future__ import annotations

from typing import Any

import msgspec

from benchmarks.alloc_cases import Effort, fixed_sizes, from_python, mixed
from benchmarks.alloc_loop import Loop, torch_library
from benchmarks.contenders import Stage
from benchmarks.worker import Handler, serve
from torch_elastic_mem import _C


class AllocWorker:
    """Readings of one contender on a GPU, through torch; of ours, through its core as well."""

    def __init__(self, contender: str, backend: str) -> None:
        self._stage = Stage(contender, backend)
        self._loop = Loop(torch_library(), self._stage.device.index)
        self._core = None
        if self._stage.arena is not None:
            self._account = self._stage.arena.account("core", "training")
            self._core = self._account.allocator()

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """The readings of one round."""
        effort = msgspec.convert(request["effort"], Effort)
        found: dict[str, Any] = {
            "uuid": self._stage.uuid(),
            "torch": fixed_sizes(self._loop.pairs, effort),
            "mixed": mixed(self._loop, effort),
            "python": from_python(self._stage.device, effort),
        }
        core = self._core
        if core is not None:
            found["core"] = fixed_sizes(
                lambda nbytes, pairs, threads: _C.bench_malloc(core, nbytes, 0, pairs, threads) * 1e9, effort
            )
        return found


def make(contender: str, backend: str) -> Handler:
    """A worker for a contender."""
    return AllocWorker(contender, backend)


if __name__ == "__main__":
    serve(make)
