"""A simulated engine: continuous batching over a KV cache whose blocks are really allocated and freed.

Time is simulated, so what an allocation costs on the wall clock never changes what the engine asks for, and
every cache meets the same demands. The engine steps every 20 ms, one decoded token a step; a prompt takes its
length over 10,000 tokens a second, however many others are being read. A request that does not fit waits; a
running one that cannot grow makes the youngest give up its blocks and start again, as vLLM's recompute does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch_elastic_mem as tem
from benchmarks.residency import Residency
from benchmarks.traces import Request

STEP_S = 0.020
PREFILL_TOKENS_PER_S = 10_000
BLOCK_TOKENS = 16


class Cache(Protocol):
    """What the engine needs of a KV cache."""

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; tem.OutOfMemory when they are not to be had."""

    def free(self, blocks: list[int]) -> None:
        """Gives back blocks."""

    def compact(self) -> dict[int, int]:
        """Moves blocks to empty extents; returns where each moved block is now."""

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks now taken."""

    @property
    def mapped_bytes(self) -> int:
        """Bytes of physical memory behind the cache."""


@dataclass(slots=True, eq=False)
class _Sequence:
    request: Request
    tokens: int  # whose keys and values are in the cache
    left: int  # tokens still to generate
    prefilled_at: float = 0.0
    blocks: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What happened to the requests, and the memory over simulated time."""

    residency: Residency
    finished: int = 0
    rejected: int = 0  # larger than the whole cache
    preempted: int = 0
    delayed: int = 0  # waited for memory before they started
    seconds: float = 0.0  # simulated


class Engine:
    """Serves requests out of one cache. Not thread-safe."""

    def __init__(self, cache: Cache, *, compact_every_s: float | None) -> None:
        self._cache = cache
        self._compact_steps = None if compact_every_s is None else max(1, round(compact_every_s / STEP_S))
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._outcome = Outcome(Residency())

    def serve(self, requests: Sequence[Request], advance: Callable[[int], None] = lambda _: None) -> Outcome:
        """Serves all requests, which come sorted by arrival; calls `advance` with the requests just done."""
        outcome = self._outcome
        arriving = 0
        step = 0
        while arriving < len(requests) or self._waiting or self._running:
            if not self._waiting and not self._running:
                step = max(step, math.ceil(requests[arriving].arrival / STEP_S))
            now = step * STEP_S
            while arriving < len(requests) and requests[arriving].arrival <= now:
                request = requests[arriving]
                self._waiting.append(_Sequence(request, request.prompt, request.output))
                arriving += 1
            done_before = outcome.finished + outcome.rejected
            self._decode(now)
            self._admit(now)
            if self._compact_steps is not None and step % self._compact_steps == 0:
                self._compact()
            outcome.residency.add(now, self._cache.live_bytes, self._cache.mapped_bytes)
            advance(outcome.finished + outcome.rejected - done_before)
            step += 1
        outcome.seconds = step * STEP_S
        return outcome

    def _admit(self, now: float) -> None:
        delayed = False
        while self._waiting:
            sequence = self._waiting[0]
            try:
                sequence.blocks = self._cache.allocate(-(-sequence.tokens // BLOCK_TOKENS))
            except tem.OutOfMemory:
                if self._running:
                    delayed = True
                    break
                # Alone in the cache and still too large: it can never be served.
                self._waiting.popleft()
                self._outcome.rejected += 1
                continue
            self._waiting.popleft()
            sequence.prefilled_at = now + sequence.tokens / PREFILL_TOKENS_PER_S
            self._running.append(sequence)
        self._outcome.delayed += delayed

    def _decode(self, now: float) -> None:
        for sequence in list(self._running):
            # Empty when a neighbour of this step took its blocks.
            if not sequence.blocks or now < sequence.prefilled_at:
                continue
            sequence.left -= 1
            if sequence.left == 0:
                self._drop(sequence)
                self._outcome.finished += 1
                continue
            sequence.tokens += 1
            if sequence.tokens > len(sequence.blocks) * BLOCK_TOKENS:
                self._grow(sequence)

    def _grow(self, sequence: _Sequence) -> None:
        while sequence.blocks:
            try:
                sequence.blocks += self._cache.allocate(1)
                return
            except tem.OutOfMemory:
                youngest = self._running[-1]
                if youngest is sequence and len(self._running) == 1:
                    self._drop(sequence)
                    self._outcome.rejected += 1
                    return
                self._drop(youngest)
                self._waiting.appendleft(youngest)
                self._outcome.preempted += 1

    def _drop(self, sequence: _Sequence) -> None:
        self._running.remove(sequence)
        self._cache.free(sequence.blocks)
        sequence.blocks = []

    def _compact(self) -> None:
        moved = self._cache.compact()
        if moved:
            for sequence in self._running:
                sequence.blocks = [moved.get(block, block) for block in sequence.blocks]
