"""`Stowage`: torch memory that is put away as a whole, and brought back to the same addresses."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torch_elastic_mem import _C, elastic_kv
from torch_elastic_mem.account import Account
from torch_elastic_mem.cpu_allocator import install_cpu_allocator
from torch_elastic_mem.errors import InUseError, TemError
from torch_elastic_mem.torch_cuda import account_of_torch
from torch_elastic_mem.torch_hooks import plain_hooks

# Torch rounds pinned memory up to a power of two.
_PIECE = 64 << 20
# What all streams had been given when memory was put away has been waited for before: only events that have
# not been looked at since are still out.
_SETTLE = 5.0
# Torch's pools have bare pointers to these.
_provider: Any = None
_kept: list[Any] = []


class Stowage:
    """What torch allocates within `allocations()`, in memory of an account.

    Put away it costs nothing, and its tensors keep their addresses: what was captured or compiled over them
    holds when they are back. Until then nothing may touch them. One thread at a time.

    Args:
        account: whom it is charged to.
        name: what it is, for messages.

    Attributes:
        away: whether it is put away.
    """

    def __init__(self, account: Account, name: str) -> None:
        self._account = account
        self._heap = _C.Allocator(account._core, f"the {name} of {account.name}")
        self._name = name
        self._saved: list[tuple[int, torch.Tensor]] = []
        self.away = False

    @property
    def bytes(self) -> int:
        """Bytes of memory; while it is away, those that bringing it back takes."""
        return sum(segment["bytes"] for segment in self._heap.segments())

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory under it now."""
        mapped: int = self._heap.stats()["reserved_bytes"]["all"]["current"]
        return mapped

    @contextmanager
    def allocations(self) -> Iterator[None]:
        """This thread's torch allocations on the account's device lie in it within the block.

        Raises:
            TemError: the torch extension was not built (host backend).
        """
        device = self._account.device
        if device.backend == "host":
            install_cpu_allocator()
        previous = _C.exchange_scope(self._heap)
        try:
            # An allocator of ours asks the thread's scope; torch's own asks only for a pool.
            if device.backend == "host" or account_of_torch(device.name) is not None:
                yield
            else:
                with _own_allocators_pool(device.name):
                    yield
        finally:
            _C.exchange_scope(previous)

    def graph_pool(self) -> tuple[int, int]:
        """A pool of torch's whose memory lies in it, whoever draws on it: for graphs that are captured.

        It lives as long as the process, for graphs may.

        Raises:
            TemError: torch's memory on the account's device is not ours (`torch_allocator`).
        """
        device = self._account.device
        if device.backend == "host" or account_of_torch(device.name) is None:
            raise TemError(f"torch's memory on {device.name} is not an account's: see torch_allocator()")
        pool: tuple[int, int] = torch.cuda.graph_pool_handle()
        # A pool stays with the malloc that served when it was first used.
        with self.allocations():
            torch._C._cuda_beginAllocateCurrentThreadToPool(device.index, pool)
            torch._C._cuda_endAllocateToPool(device.index, pool)
        _kept.append(self._heap)
        return pool

    def save(self) -> None:
        """Copies its bytes to host memory, for a `put_away` that follows at once and is to keep them.

        This is what may fail for want of host memory: nothing has gone by then.
        """
        if self.away:
            return
        self._heap.empty_cache()
        self._saved = [self._copied(address, count) for address, count in self._pieces()]
        self._synchronize()

    def drop(self) -> None:
        """Forgets what `save` has copied, where nothing follows."""
        if not self.away:
            self._saved = []

    def put_away(self, *, keep: bool) -> None:
        """Lets all memory go. The caller has seen to it that nothing uses it any more, on any stream.

        Args:
            keep: hold its bytes in host memory, pinned beside a GPU; else they are lost.

        Raises:
            InUseError: another process may use a part of it, or a graph is captured. Nothing has changed.
        """
        if self.away:
            return
        if not keep:
            self._saved = []
            self._heap.empty_cache()
        elif not self._saved:
            self.save()
        # Nothing is emptied after `save`: the bytes of what came free since are to find a place.
        self._synchronize()
        try:
            self._heap.put_away()
        except InUseError:
            self.drop()
            raise
        self.away = True
        deadline = time.monotonic() + _SETTLE
        while self.resident_bytes and time.monotonic() < deadline:
            self._account.trim()
            time.sleep(0.001)

    def bring_back(self, timeout: float | None = None) -> None:
        """Puts memory under all of it again, all or nothing, with the bytes that were kept.

        Args:
            timeout: seconds to wait for others to yield; None: the arena's `yield_timeout`.

        Raises:
            OutOfMemory: the memory is not to be had; it stays away.
        """
        if not self.away:
            return
        self._heap.bring_back(self._stream(), self._account.device.seconds(timeout))
        for address, data in self._saved:
            self._view(address, data.numel()).copy_(data, non_blocking=True)
        # Other streams may use it from now on.
        self._synchronize()
        self._saved, self.away = [], False

    def close(self) -> None:
        """Gives everything back.

        Raises:
            InUseError: tensors in it live; it stays open.
        """
        self._heap.close()
        self._saved = []

    def _pieces(self) -> Iterator[tuple[int, int]]:
        for segment in self._heap.segments():
            end = segment["address"] + segment["bytes"]
            for address in range(segment["address"], end, _PIECE):
                yield address, min(_PIECE, end - address)

    def _copied(self, address: int, count: int) -> tuple[int, torch.Tensor]:
        data = torch.empty(count, dtype=torch.uint8, device="cpu", pin_memory=self._on_cuda)
        return address, data.copy_(self._view(address, count), non_blocking=True)

    def _view(self, address: int, count: int) -> torch.Tensor:
        return elastic_kv.bytes_tensor(self._heap.export(address, count))

    @property
    def _on_cuda(self) -> bool:
        return self._account.device.backend == "cuda" and torch.cuda.is_available()

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self._account.device.index) if self._on_cuda else 0

    def _synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self._account.device.index)


@contextmanager
def _own_allocators_pool(device: str) -> Iterator[None]:
    """Has torch's own allocator take segments for this thread from the thread's scope.

    The pool itself goes with the block, and with it what came free meanwhile; its tensors stay.
    """
    global _provider
    if _provider is None:
        _provider = plain_hooks()
        # To the end of the process, when tensors are freed that outlive this module.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_provider))
    with _whole_segments(), torch.cuda.use_mem_pool(torch.cuda.MemPool(_provider), device):
        yield


@contextmanager
def _whole_segments() -> Iterator[None]:
    """Turns `expandable_segments` off, which torch does not combine with a pool's own allocator."""
    given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    plain = re.sub(r"(expandable_segments\s*:\s*)True", r"\1False", given)
    if plain == given:
        yield
        return
    # Torch forgets every setting that the text does not name.
    torch._C._accelerator_setAllocatorSettings(plain)
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(given)
