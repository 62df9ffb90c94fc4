"""Torch's CUDA allocator over accounts: what `torch.cuda.memory.change_current_allocator` takes."""

from __future__ import annotations

import os
import re
import threading
import warnings
from typing import Any

import torch

from torch_elastic_mem import _C
from torch_elastic_mem.account import Account
from torch_elastic_mem.defaults import default_arena
from torch_elastic_mem.device import cuda_index
from torch_elastic_mem.errors import DriverMissing, InUseError, InvalidArgument, TemError
from torch_elastic_mem.extension import torch_extension
from torch_elastic_mem.priority import PriorityClass
from torch_elastic_mem.priority import priority as class_of
from torch_elastic_mem.torch_hooks import MISSING, plain_hooks

_lock = threading.Lock()
_process_allocator: TorchAllocator | None = None  # guarded by the lock; torch keeps it to the end


class TorchAllocator(torch.cuda.memory._CUDAAllocator):
    """What torch's CUDA allocations go to: an account on each device. Made by `torch_allocator`. Thread-safe.

    A process has one, as torch keeps the allocator that it is given.
    """

    def __init__(self, torch_object: Any) -> None:
        super().__init__(torch_object)
        self._lock = threading.RLock()
        self._accounts: dict[int, Account] = {}  # guarded by the lock, like the next
        self._wanted: dict[int, tuple[PriorityClass, str]] = {}

    def serves(self, index: int) -> bool:
        """Whether the device has an account, or will have one once CUDA is initialised."""
        with self._lock:
            return index in self._accounts or index in self._wanted

    def serve(self, account: Account) -> None:
        """Makes an account the one of its device, in place of whichever was."""
        with self._lock:
            index = account.device.index
            _C.set_device_default(index, account.allocator())
            self._accounts[index] = account
            self._wanted.pop(index, None)

    def want(self, index: int, limits: PriorityClass, name: str) -> None:
        """Has `account` open one in the device's default arena.

        Raises:
            InUseError: the device has another account.
        """
        with self._lock:
            known = self._wanted.get(index)
            if known != (limits, name) and self.serves(index):
                other = known[1] if known else self._accounts[index].name
                raise InUseError(
                    f"torch's memory on cuda:{index} is charged to {other!r} already, and {name!r} was asked "
                    "for: one account of a device serves torch; use account.allocations() for others"
                )
            self._wanted[index] = limits, name

    def account(self, device: str = "cuda") -> Account:
        """The account that serves a device, opened now if none has asked for it yet.

        Raises:
            InvalidArgument: none serves it. Whatever `default_arena` and `Arena.account` raise.
        """
        index = cuda_index(device)
        with self._lock:
            if index not in self._accounts:
                if index not in self._wanted:
                    raise InvalidArgument(f"no account serves torch on cuda:{index}")
                limits, name = self._wanted[index]
                account = default_arena(device).account(name, limits)
                _C.set_device_default(index, account.allocator())
                self._accounts[index] = account
            return self._accounts[index]


def torch_allocator(
    device: str = "cuda",
    account: Account | None = None,
    *,
    priority: str | PriorityClass | None = None,
    name: str | None = None,
) -> TorchAllocator:
    """The allocator that makes torch's CUDA memory an account's. Thread-safe.

    Given to torch before it uses CUDA:

        torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", priority="training"))

    Every thread's allocations are charged to the account where no `account.allocations()` scope is active.
    A further call for another device adds that device to the allocator, which torch then has already.

    It is a whole allocator of torch's where `torch_elastic_mem._torch_cuda` was built for the torch that
    runs. Elsewhere it is torch's plain C hooks, with a warning that says what they lack.

    Args:
        device: "cuda", which is "cuda:0", or "cuda:N".
        account: an open account on the device; it takes the place of one given before. Or else:
        priority: the class of an account to be opened in `default_arena(device)`. It is opened when torch
            initialises CUDA; until then no driver is touched, and the process may fork.
        name: that account's name; its class's by default.

    Raises:
        InvalidArgument: the account is on another device, there is no such device or class, neither or both
            of account and priority are given, or the environment chooses `backend:cudaMallocAsync`.
        DriverMissing: this torch has no CUDA.
        InUseError: torch has initialised CUDA already, has another allocator, or charges the device to
            another account than the one that the priority asks for.
    """
    if isinstance(account, Account):
        if priority is not None or name is not None:
            raise InvalidArgument(f"the account {account.name!r} has a priority and a name; leave those out")
        own = account.device.name
        if own != (f"{device}:0" if device == "cuda" else device):
            raise InvalidArgument(f"the account {account.name!r} is on {own}, not on {device!r}")
        if account.device.backend != "cuda":
            raise InvalidArgument(f"the account {account.name!r} is on {own}; torch's CUDA memory cannot be")
        made = process_allocator()
        made.serve(account)
        return made
    if account is not None or priority is None:
        raise InvalidArgument(
            f"torch_allocator takes an account, or priority='training'; got account={account!r} and "
            f"priority={priority!r}"
        )
    index = cuda_index(device)
    limits = priority if isinstance(priority, PriorityClass) else class_of(priority)
    made = process_allocator()
    # Asks NVML, not the driver, which may not be initialised before a fork. Negative: not known.
    devices = torch.cuda._device_count_nvml()
    if 0 <= devices <= index:
        raise InvalidArgument(f"there is no cuda:{index}: {devices} CUDA devices are visible to this process")
    made.want(index, limits, limits.name if name is None else name)
    # Runs between CUDA's initialisation and the first allocation, or now. If it fails, so does CUDA's
    # initialisation, and both are tried again when CUDA is next asked for.
    torch.cuda._lazy_call(lambda: made.account(device))
    return made


def process_allocator(*, hooks: bool = True) -> TorchAllocator:
    """The process's one allocator, made when first asked for. Thread-safe.

    Args:
        hooks: whether torch's plain C hooks will do where the extension is missing.

    Raises:
        DriverMissing, InvalidArgument, InUseError: as `torch_allocator`. TemError: the extension is missing.
    """
    global _process_allocator
    with _lock:
        if _process_allocator is None:
            _refuse_what_cannot_work()
            _process_allocator = TorchAllocator(_torch_object(hooks))
        return _process_allocator


def account_of_torch(device: str) -> Account | None:
    """The account that torch's memory on the device is charged to; None where torch has its own. Thread-safe.

    Raises:
        InvalidArgument: it is the name of no CUDA device.
    """
    with _lock:
        made = _process_allocator
    return made.account(device) if made is not None and made.serves(cuda_index(device)) else None


def _torch_object(hooks: bool) -> Any:
    try:
        extension = torch_extension("_torch_cuda")
    except TemError as missing:
        if not hooks:
            raise
        warnings.warn(f"torch's plain C hooks are used, without {MISSING}: {missing}", stacklevel=4)
        return plain_hooks()
    return extension.make_allocator(_C.malloc_directory())


def _refuse_what_cannot_work() -> None:
    if torch.version.cuda is None:
        raise DriverMissing("this torch is built without CUDA; install a CUDA build")
    if torch.cuda.is_initialized():
        raise InUseError(
            "torch has initialised CUDA already; call torch_allocator before the first CUDA tensor"
        )
    variable = next((v for v in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF") if v in os.environ), "")
    backend = torch.cuda.memory.get_allocator_backend()
    if backend == "cudaMallocAsync":
        raise InvalidArgument(
            f"{variable} gives torch's memory to the driver (backend:cudaMallocAsync), and torch_allocator "
            "would give it to an account: take one of the two away"
        )
    if backend != "native":
        raise InUseError(
            f"torch has the allocator {backend!r} already, and keeps one a process: install this one instead"
        )
    if re.search(r"expandable_segments\s*:\s*True", os.environ.get(variable, "")):
        # Torch's own allocator alone reads it, so it does no harm either.
        warnings.warn(
            f"expandable_segments in {variable} has no effect: it is an option of torch's own allocator, and "
            "an account's memory expands by itself",
            stacklevel=4,
        )
