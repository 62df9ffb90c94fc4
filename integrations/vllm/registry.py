"""What of a process's engines is on an arena: their caches, and the accounts that were opened for them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

import torch

from torch_elastic_mem.account import Account
from torch_elastic_mem.arena import Arena
from torch_elastic_mem.defaults import default_arena
from torch_elastic_mem.errors import InUseError, InvalidArgument
from torch_elastic_mem.integrations.vllm import variables
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.ranks import Ranks
from torch_elastic_mem.torch_cuda import account_of_torch

_lock = threading.Lock()
_host: Arena | None = None  # guarded by the lock
# By the engine's instance id; guarded by the lock, like the next.
_caches: dict[str, ElasticCache | Ranks] = {}
_opened: list[Account] = []  # by open_account
_left: list[Account] = []  # of these, those whose engine has ended
_unclosed: list[Callable[[], None]] = []  # what closes what tensors have outlived


def arena_of(device: torch.device, nbytes: int | None) -> Arena:
    """This process's arena on the device; opened on first use, and never closed.

    Args:
        device: where the engine runs.
        nbytes: the most that the KV cache may come to, for an arena on the host; None: all of it.
    """
    global _host
    if device.type == "cuda":
        return default_arena(f"cuda:{device.index or 0}")
    with _lock:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if _host is None:
            _host = Arena("host", capacity=machine)
            if nbytes is not None and _host.broker is None:
                _host.set_capacity(nbytes)
        elif nbytes is not None and _host.broker is None and _host.capacity < nbytes:
            _host.set_capacity(nbytes)
        return _host


def open_account(arena: Arena) -> Account:
    """The account that has torch's memory already, or one that the TEM_* variables describe."""
    _close_left()
    if arena.backend == "cuda" and (found := account_of_torch(arena.device)) is not None:
        return found
    settings = variables.account(os.environ)
    wanted, number = settings.name or "vllm", 1
    while True:
        try:
            name = wanted if number == 1 else f"{wanted}-{number}"
            account = arena.account(name, settings.priority_class())
            with _lock:
                _opened.append(account)
            return account
        except InvalidArgument:
            # Another engine of this process has the name; what else may be wrong stays so.
            if number > len(arena.snapshot().accounts):
                raise
            number += 1


def close_later(close: Callable[[], None]) -> None:
    """Calls it, and as long as it raises `InUseError` again whenever an engine starts or ends."""
    with _lock:
        _unclosed.append(close)
    _close_left()


def _close_left() -> None:
    with _lock:
        for close in list(_unclosed):
            with suppress(InUseError):
                close()
                _unclosed.remove(close)
        for account in list(_left):
            try:
                account.close()
            except InUseError:
                # vLLM's views of the cache may outlive the engine. Without memory they cost nothing.
                account.trim()
                continue
            _left.remove(account)
            _opened.remove(account)


def keep(engine: str, cache: ElasticCache | Ranks) -> None:
    """Has the engine's scheduler find the cache that its worker made in this process, or its ranks."""
    with _lock:
        _caches[engine] = cache


def find(engine: str) -> ElasticCache | Ranks | None:
    """What the engine's scheduler orders the memory of, if it was made elastic."""
    with _lock:
        return _caches.get(engine)


def forget(engine: str) -> None:
    """The engine has been shut down. The account that was opened for it goes when its tensors have gone."""
    with _lock:
        cache = _caches.pop(engine, None)
        if isinstance(cache, ElasticCache) and cache.account in _opened:
            _left.append(cache.account)
    del cache
    _close_left()
