"""An engine's KV cache on an arena: addresses for all its blocks, memory under some of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torch_elastic_mem.account import Account
from torch_elastic_mem.elastic_kv import ElasticKVTensor
from torch_elastic_mem.errors import OutOfMemory
from torch_elastic_mem.integrations.vllm.compat import Region, Unsupported
from torch_elastic_mem.integrations.vllm.memory import Resting

# What comes and goes at once, of all regions together. A driver's call costs the same for 2 MiB and for 64:
# some 110 us to take an extent here and map it there, so that 8 GiB come in 15 ms by the largest and in 60 by
# those of 16 MiB. The smaller the piece, the sooner nothing lives on it: a cache has at least so many pieces.
EXTENT = 64 << 20
PIECES = 192
# How often a growth looks whether what was let go is gone, in seconds: the arena takes it in a millisecond.
LOOK = 5e-4

# The blocks of requests, by their id: numbers for each group of layers.
BlockTables = dict[str, tuple[list[int], ...]]


class ElasticCache:
    """The memory under an engine's blocks, in chunks of neighbouring blocks. Thread-safe.

    Args:
        account: whom it is charged to.
        num_blocks: of the whole cache.
        regions: what vLLM allocates; a block has bytes in each.
        aside: others than the steps use it, on streams of their own, as a KV connector does.

    Attributes:
        chunk_blocks: blocks that come and go together.
        num_chunks: the last may be shorter.
        chunk_bytes: bytes of a whole chunk in all regions.
        freed_bytes: what giving up a chunk frees at least, beside neighbours that stay.
        on_enqueued: called by the worker when the stream has all of a step's work.
        on_moved: has the worker use these tables from the next step on.
        resting: whom sleep and wake-up go to.
    """

    def __init__(
        self, account: Account, num_blocks: int, regions: Sequence[Region], *, aside: bool = False
    ) -> None:
        self.account = account
        self.num_blocks = num_blocks
        self.aside = aside
        self.block_bytes = sum(region.block_bytes * region.layers for region in regions)
        pieces = sum(region.layers for region in regions)
        extent = self._extent(pieces)
        smallest = min(region.block_bytes for region in regions)
        self.chunk_blocks = max(1, -(-extent // smallest))
        if not all(self._apart(region, extent) for region in regions):
            # Neighbouring chunks share the extents at their edges: those had better be small, and few.
            granularity = account.device.granularity
            self.chunk_blocks = max(1, -(-max(extent, 4 * granularity) // smallest))
            extent = granularity
        self._extent_bytes, self._regions = extent, list(regions)
        self.set_chunks(self.chunk_blocks)
        self.on_enqueued: Callable[[], None] = lambda: None
        self.on_moved: Callable[[BlockTables], None] = lambda _: None
        self.resting: Resting | None = None
        self._stream: Any = None
        self._let_go: set[int] = set()  # chunks whose memory may not have gone yet
        # Chunks that have memory or are about to: who counts what comes free had better count too little.
        self._backed: set[int] = set()
        # Regions of one shape are stripes of one cache: their extents come and go together.
        self._parts: list[tuple[ElasticKVTensor, int]] = []
        self._free: dict[int, list[torch.Tensor]] = {}
        for region in sorted(set(regions), key=lambda region: region.bytes):
            part = ElasticKVTensor(
                account,
                num_blocks * region.layers,
                (region.block_bytes,),
                torch.int8,
                layers=list(regions).count(region),
                layout="layer",
                extent=extent,
            )
            self._parts.append((part, region.layers))
            self._free.setdefault(region.bytes, []).extend(tensor.view(-1) for tensor in part.tensors)

    def set_chunks(self, blocks: int) -> None:
        """Has so many blocks come and go together, no fewer than before; while none has memory."""
        extent = self._extent_bytes
        self.chunk_blocks = blocks
        self.num_chunks = -(-self.num_blocks // blocks)
        self.chunk_bytes = blocks * self.block_bytes
        self.all_apart = all(self._apart(region, extent) for region in self._regions)
        self.freed_bytes = 0
        for region in self._regions:
            whole = blocks * region.block_bytes // extent - (not self._apart(region, extent))
            self.freed_bytes += extent * region.layers * whole

    def _apart(self, region: Region, extent: int) -> bool:
        """Neighbouring chunks share no extent of the region."""
        size, end = self.chunk_blocks, self.num_blocks
        each_layer = region.layers == 1 or end * region.block_bytes % extent == 0
        return each_layer and size * region.block_bytes % extent == 0

    def bytes_under(self, chunks: Collection[int], beside: Collection[int] = ()) -> int:
        """The most that memory under these chunks takes: extents that they touch, and those beside do not."""
        return self._extent_bytes * sum(
            len(self._touched(each, chunks) - self._touched(each, beside)) * count
            for each, count in Counter(self._regions).items()
        )

    def _touched(self, region: Region, chunks: Collection[int]) -> set[int]:
        extent, size, end = self._extent_bytes, self.chunk_blocks, self.num_blocks
        touched: set[int] = set()
        for layer in range(region.layers):
            for chunk in chunks:
                blocks = (chunk * size, min((chunk + 1) * size, end))
                start, stop = ((layer * end + block) * region.block_bytes for block in blocks)
                touched.update(range(start // extent, -(-stop // extent)))
        return touched

    def _extent(self, pieces: int) -> int:
        granularity = self.account.device.granularity
        wanted = min(EXTENT // pieces, self.num_blocks * self.block_bytes // pieces // PIECES)
        return max(granularity, 1 << max(wanted, 1).bit_length() - 1)

    @property
    def whole_blocks(self) -> bool:
        """Whether a block's bytes of all layers lie together."""
        return len(self._regions) == self._regions[0].layers == 1

    @contextmanager
    def handed_out(self) -> Iterator[None]:
        """Within the block vLLM's allocations of the KV cache are answered with this cache's tensors.

        Raises:
            Unsupported: it did not ask for each region once.
        """
        with _Allocations(self._free):
            yield
        if left := sum(map(len, self._free.values())):
            raise Unsupported(
                f"vLLM did not allocate {left} of its KV cache's regions where they were expected"
            )

    def blocks(self, chunks: Iterable[int]) -> list[int]:
        """The blocks of these chunks."""
        size, end = self.chunk_blocks, self.num_blocks
        return [block for chunk in chunks for block in range(chunk * size, min((chunk + 1) * size, end))]

    def freed(self, chunks: Iterable[int]) -> int:
        """Bytes that come free with these chunks; none of a short last one that shares no extent."""
        given = set(chunks)
        if self.all_apart:
            return self.freed_bytes * sum(chunk < self.num_blocks // self.chunk_blocks for chunk in given)
        beside = {chunk + step for chunk in given for step in (-1, 1)}
        beside.update((0, self.num_chunks - 2, self.num_chunks - 1))
        return self.bytes_under(given, (beside & self._backed) - given)

    def use_stream(self) -> None:
        """The calling thread's current stream is the one whose work touches the cache from now on."""
        if self.account.device.backend == "cuda":
            before, self._stream = self._stream, torch.cuda.current_stream()
            if before is not None and before != self._stream:
                # Another thread steps from now on: what is behind its work is behind all that came before.
                self._stream.wait_stream(before)

    def number(self, step: Any) -> None:
        """The worker, in this process, says when the stream has a step's work; it needs no number."""

    def room(self) -> int:
        """Bytes that are to be had without asking anybody, as far as this process knows."""
        return self.account.room()

    def ensure(self, chunks: Iterable[int], rung: str = "pause", timeout: float | None = None) -> None:
        """Puts memory under all of the chunks or none; others are asked for it up to the rung.

        Steps to come may use it, and with `aside` whoever else does: what others had written to it is gone.

        Raises:
            OutOfMemory: the memory is not to be had.
        """
        chunks = list(chunks)
        self._await_gone(chunks, self.account.device.seconds(timeout))
        blocks = self.blocks(chunks)
        done: list[tuple[ElasticKVTensor, list[int]]] = []
        self._backed.update(chunks)
        # Zeroed between steps: on a stream beside theirs, an H200 leaves longer gaps between the kernels of
        # all steps that follow. What comes in vain goes behind that, and behind steps it may have been under.
        stream = self._stream
        with torch.cuda.stream(stream):
            try:
                for part, layers in self._parts:
                    numbers = self._in_layers(blocks, layers)
                    part.ensure(numbers, timeout=timeout, rung=rung)
                    done.append((part, numbers))
            except BaseException:
                self._backed.difference_update(chunks)
                for part, numbers in done:
                    part.release(numbers)
                raise
        if stream is not None and (self.aside or stream != self._stream):
            stream.synchronize()

    def release(self, chunks: Iterable[int]) -> None:
        """Lets the memory under these chunks go, after all that the stream has been given so far."""
        chunks = list(chunks)
        self._let_go.update(chunks)
        self._backed.difference_update(chunks)
        blocks = self.blocks(chunks)
        with torch.cuda.stream(self._stream):
            for part, layers in self._parts:
                part.release(self._in_layers(blocks, layers))

    def going(self) -> Iterable[int]:
        """Chunks that were let go and have memory yet."""
        # A copy: the thread that grows takes chunks out of it meanwhile.
        self._let_go -= {chunk for chunk in tuple(self._let_go) if not self._has_memory(chunk)}
        return list(self._let_go)

    def _await_gone(self, chunks: list[int], seconds: float) -> None:
        """Waits until what was let go of these chunks is gone.

        It goes to whoever asked for it, behind the steps on their way. To hold it again meanwhile would go
        past the ledger, and past who waits there.
        """
        deadline = time.monotonic() + seconds
        for chunk in self._let_go.intersection(chunks):
            while self._has_memory(chunk):
                if time.monotonic() >= deadline:
                    raise OutOfMemory(
                        f"chunk {chunk} of the KV cache has been given up, and steps that may touch it have "
                        "not ended; try again"
                    )
                time.sleep(LOOK)
            self._let_go.discard(chunk)

    def _has_memory(self, chunk: int) -> bool:
        """Whether a chunk that is let go has some yet; of a last one that is short, none is promised."""
        if chunk >= self.num_blocks // self.chunk_blocks:
            return False
        # A block at the edge may lie on an extent that a neighbour has too.
        middle = [chunk * self.chunk_blocks + self.chunk_blocks // 2]
        return any(
            part.is_resident(block)
            for part, layers in self._parts
            for block in self._in_layers(middle, layers)
        )

    def copy(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copies blocks, (from, to), after all that the stream has been given so far; none is both."""
        with torch.cuda.stream(self._stream):
            for part, layers in self._parts:
                sources = self._in_layers([source for source, _ in moves], layers)
                places = self._in_layers([to for _, to in moves], layers)
                for tensor in part.tensors:
                    # One launch for many, and no memory aside, of which there may be none.
                    torch._foreach_copy_([tensor[to] for to in places], [tensor[block] for block in sources])

    def _in_layers(self, blocks: list[int], layers: int) -> list[int]:
        if layers == 1:
            return blocks
        return [layer * self.num_blocks + block for layer in range(layers) for block in blocks]

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory under the cache."""
        return sum(part.resident_bytes for part, _ in self._parts)


class _Allocations(TorchFunctionMode):
    """Answers the allocations of a KV cache, by their size, and no others."""

    def __init__(self, tensors: dict[int, list[torch.Tensor]]) -> None:
        super().__init__()
        self._tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") is torch.int8 and len(args) == 1:
            waiting = self._tensors.get(args[0])
            if waiting:
                return waiting.pop(0)
        return func(*args, **kwargs)
