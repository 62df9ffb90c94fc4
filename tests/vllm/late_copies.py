"""KV connectors that are made for GPUs work on the CPU, by copies that are made late."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

# In which processes of vLLM's `OffloadingConnector` copies so, where an engine has several.
LATE = "TESTS_LATE_COPIES"
NEVER = 10**9
offloading: Offloading | None = None


class LateCopies:
    """In place of the streams that copy blocks on a GPU: a copy is made when vLLM has asked for it thrice."""

    def init(self, cache: Any, kept: Any, *_: Any) -> None:
        self._cache, self._kept = cache, kept

    def launch_copy(
        self,
        source: list[int],
        target: list[int],
        is_store: bool,
        event_idx: int,
        events_list: list[Any],
        wait_event: Any = None,
    ) -> None:
        events_list.append((event_idx, LateCopy(self, list(source), list(target), is_store)))

    def copy(self, source: list[int], target: list[int], is_store: bool) -> None:
        into, of = (self._kept, self._cache) if is_store else (self._cache, self._kept)
        for name in into:
            # Where a block has no memory this ends the process.
            into[name][target] = of[name][source]


class LateCopy:
    """An event of vLLM's, by which it asks whether a copy has ended."""

    def __init__(self, copies: LateCopies, *what: Any) -> None:
        self._copies, self._what, self._asked = copies, what, 0

    def query(self) -> bool:
        self._asked += 1
        if self._asked == 3:
            self._copies.copy(*self._what)
        return self._asked >= 3

    def synchronize(self) -> None:
        while not self.query():
            pass


def copy_late() -> None:
    """Has `SimpleCPUOffloadConnector`, which is made for GPUs, work on the CPU."""
    import torch
    from vllm.v1.simple_kv_offload import worker

    class Stream:
        def __init__(self, **_: Any) -> None: ...

        @staticmethod
        def priority_range() -> tuple[int, int]:
            return 0, 0

    class Torch:
        cuda = SimpleNamespace(Stream=Stream, current_stream=lambda: None)

        @staticmethod
        def Event() -> Any:
            return SimpleNamespace(record=lambda _: None)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    worker.torch = Torch()
    worker.PIN_MEMORY = False
    worker.DmaCopyBackend = LateCopies


class Offloading:
    """How `OffloadingConnector` copies, from when it is made on.

    Attributes:
        late: so many steps after it was asked for a copy is made, unless vLLM waits for it: a request has
            ended by then.
    """

    def __init__(self, late: int = 30) -> None:
        from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
        from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

        self.late = late
        offloading = self

        class Worker(OffloadingWorker):
            def __init__(self, caches: Any) -> None:
                self._caches, self._kept = [each.tensor for each in caches.tensors], {}
                self._jobs: dict[int, list[Any]] = {}
                self._done: list[int] = []

            def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
                self._jobs[job_id] = [0, True, list(src_spec.block_ids), list(dst_spec.block_ids)]
                return True

            def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
                self._jobs[job_id] = [0, False, list(dst_spec.block_ids), list(src_spec.block_ids)]
                return True

            def _copy(self, job_id: int) -> None:
                _, is_store, blocks, places = self._jobs.pop(job_id)
                for number, cache in enumerate(self._caches):
                    for block, place in zip(blocks, places, strict=True):
                        # Where a block has no memory this ends the process.
                        if is_store:
                            self._kept[number, place] = cache[block].clone()
                        else:
                            cache[block] = self._kept[number, place]
                self._done.append(job_id)

            def get_finished(self) -> list[Any]:
                for job in self._jobs.values():
                    job[0] += 1
                for job_id in [each for each, job in self._jobs.items() if job[0] >= offloading.late]:
                    self._copy(job_id)
                done, self._done = self._done, []
                return [TransferResult(job_id, True) for job_id in done]

            def wait(self, job_ids: set[int]) -> None:
                for job_id in job_ids & self._jobs.keys():
                    self._copy(job_id)

        CPUOffloadingSpec.get_worker = lambda self, caches: Worker(caches)


def where_asked() -> None:
    global offloading
    if steps := os.environ.get(LATE):
        offloading = Offloading(int(steps))
