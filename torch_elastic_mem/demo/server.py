"""Serving: requests wait, are admitted, decoded and preempted, with their KV cache in elastic memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch_elastic_mem as tem
from torch_elastic_mem.demo.bursts import Arrival
from torch_elastic_mem.demo.decoder import PagedDecoder

_RETRY_SECONDS = 0.05
_COMPACT_WASTE = 4  # compact when more than one byte in four of the resident ones holds no live block
_COMPACT_COPIES = 32


@dataclass
class Request:
    """One request on its way. `produced` only grows; `blocks` is empty while it waits."""

    number: int
    prompt: tuple[int, ...]
    new_tokens: int
    produced: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.produced)

    @property
    def done(self) -> bool:
        return len(self.produced) >= self.new_tokens


class Server:
    """Serves arrivals from one thread. Its counters may be read from any.

    Args:
        kv: The cache; all of it is the server's.
        decoder: Decodes out of `kv`.
        arrivals: What comes, in order of time.
        block_tokens: Tokens of one block.
    """

    def __init__(
        self, kv: tem.ElasticKVTensor, decoder: PagedDecoder, arrivals: Iterable[Arrival], block_tokens: int
    ) -> None:
        self._kv = kv
        self._pool = tem.BlockPool(kv)
        self._decoder = decoder
        self._block_tokens = block_tokens
        self._coming = deque(
            (arrival.at, Request(number, arrival.prompt, arrival.new_tokens))
            for number, arrival in enumerate(arrivals)
        )
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._retry_at = 0.0
        self.finished: list[Request] = []
        self.tokens = 0
        self.preemptions = 0
        self.refused = 0
        self.compactions = 0
        self.compacted_bytes = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def run(self, stop: threading.Event) -> None:
        """Serves until `stop`, or until all that was to come is answered."""
        begin = time.monotonic()
        try:
            while not stop.is_set() and (self._coming or self._waiting or self._running):
                self._arrive(time.monotonic() - begin)
                if not self._round():
                    stop.wait(0.005)
        finally:
            for request in self._running:
                self._give_back(request)
            self._waiting.extend(self._running)
            self._running.clear()

    def served(self) -> list[Request]:
        """Every request that has got a token, in order of arrival; for when `run` is over."""
        begun = [*self.finished, *self._waiting]
        return sorted((request for request in begun if request.produced), key=lambda request: request.number)

    def _arrive(self, now: float) -> None:
        while self._coming and self._coming[0][0] <= now:
            self._waiting.append(self._coming.popleft()[1])

    def _round(self) -> bool:
        """Admits a request, or else decodes a token of each that runs; returns whether there was work."""
        # Prompts first: a burst then takes its memory as fast as it comes, however slow the machine decodes.
        if self._admit():
            return True
        for request in list(self._running):
            # Growth of an earlier one may have preempted this one.
            if request.blocks and self._grow(request):
                self._decode(request)
        self._compact()
        return bool(self._running)

    def _admit(self) -> bool:
        if not self._waiting or time.monotonic() < self._retry_at:
            return False
        request = self._waiting[0]
        try:
            request.blocks = self._pool.allocate(-(-request.length // self._block_tokens))
            self._begin(request)
        except (RuntimeError, MemoryError) as error:
            self._refuse(request, error)
            return False
        self._waiting.popleft()
        self._running.append(request)
        self._end_if_done(request)
        return True

    def _begin(self, request: Request) -> None:
        """Fills a request's cache: by its prompt at once, and by what it has produced token by token.

        The same calls in the same order as when it ran first, for a product over several tokens rounds
        otherwise than over one.
        """
        token = self._decoder.prefill(request.prompt, request.blocks)
        for position, known in enumerate(request.produced[:-1], len(request.prompt)):
            self._decoder.step(known, position, request.blocks)
        if not request.produced:
            self._produce(request, token)

    def _grow(self, request: Request) -> bool:
        """Makes room for one more token, at worst by preempting the youngest; false if that is itself."""
        while len(request.blocks) * self._block_tokens < request.length:
            try:
                request.blocks += self._pool.allocate(1)
            except tem.OutOfMemory:
                self._preempt(self._running[-1])
                if not request.blocks:
                    return False
        return True

    def _decode(self, request: Request) -> None:
        try:
            token = self._decoder.step(request.produced[-1], request.length - 1, request.blocks)
        except (RuntimeError, MemoryError) as error:
            if not tem.is_out_of_memory(error):
                raise
            self._preempt(self._running[-1])
            return
        self._produce(request, token)
        self._end_if_done(request)

    def _produce(self, request: Request, token: int) -> None:
        request.produced.append(token)
        self.tokens += 1

    def _end_if_done(self, request: Request) -> None:
        if request.done:
            self._give_back(request)
            self._running.remove(request)
            self.finished.append(request)

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        self._running.remove(request)
        self._waiting.appendleft(request)
        self._give_back(request)
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    def _refuse(self, request: Request, error: Exception) -> None:
        self._give_back(request)
        if not tem.is_out_of_memory(error):
            raise error
        self.refused += 1
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    def _give_back(self, request: Request) -> None:
        blocks, request.blocks = request.blocks, []
        if blocks:
            self._pool.free(blocks)

    def _compact(self) -> None:
        waste = self._kv.resident_bytes - self._kv.live_bytes
        if waste * _COMPACT_WASTE <= self._kv.resident_bytes:
            return
        plan = self._pool.plan_compaction(max_copies=_COMPACT_COPIES)
        if not plan.copies:
            plan.abort()
            return
        self._kv.copy_blocks(plan.copies)
        moved = dict(plan.copies)
        for request in self._running:
            request.blocks = [moved.get(block, block) for block in request.blocks]
        plan.commit()
        self.compactions += 1
        self.compacted_bytes += plan.freed_bytes
