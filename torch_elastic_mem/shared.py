"""One copy of frozen weights for several processes.

weights = tem.share("base.safetensors", "base", arena=arena)    # in one process
weights = tem.attach("base")                                    # in others
model.load_state_dict(weights.tensors, assign=True)
"""

from __future__ import annotations

import fcntl
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType

import msgspec
import torch

from torch_elastic_mem import _C, elastic_kv
from torch_elastic_mem import arena as arenas
from torch_elastic_mem.account import Account
from torch_elastic_mem.arena import Arena
from torch_elastic_mem.device import device_of
from torch_elastic_mem.errors import BrokerError, InUseError, InvalidArgument
from torch_elastic_mem.priority import PriorityClass
from torch_elastic_mem.share_link import ShareLink, shares_socket
from torch_elastic_mem.weights import Header, SafetensorsFile, Slot, StateDict, Weights, size_of

# All of a machine's host memory is one device to a broker.
_HOST = "HOST"
_LEAST = 2 << 20
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# Seconds for the fence of what was written.
_LAST_FENCE = 5.0


class SharedWeights(Mapping[str, torch.Tensor]):
    """Tensors by name, in memory that other processes have mapped too. Made by `share` and `attach`.

    A write to one is an error of this process alone, and never seen by others: on the host backend a SIGSEGV,
    on CUDA an illegal address; see `read_only`. Tensors that outlive `close` keep the memory mapped, and this
    process a member. In a child of fork() they must not be touched.

    Attributes:
        name: by which others attach.
        device: as torch names it.
        nbytes: of memory, the alignment included.
        read_only: the device refuses writes. False where the driver knows no read-only mappings: a write is
            then a write to everybody's weights.
        tensors: contiguous, without copies; names that were one tensor are one. Empty when closed.
    """

    def __init__(self, name: str, device: str, memory: _C.Attached, slots: Mapping[str, Slot]) -> None:
        self.name = name
        self.device = device
        self.nbytes = memory.bytes
        self.read_only = memory.read_only
        made: dict[Slot, torch.Tensor] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        for key, slot in slots.items():
            if slot not in made:
                made[slot] = slot.view(elastic_kv.bytes_tensor(memory.export(slot.offset, slot.nbytes)))
            self.tensors[key] = made[slot]

    def __repr__(self) -> str:
        return f"<SharedWeights {self.name!r} on {self.device}: {len(self.tensors)} tensors>"

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __enter__(self) -> SharedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets the tensors go. Harmless the second time.

        When the last of them is gone, and what was queued on the device, the process has left.
        """
        self.tensors = {}


def share(
    weights: Mapping[str, torch.Tensor] | str | os.PathLike[str],
    name: str,
    *,
    arena: Arena,
    priority: str | PriorityClass = "serving",
) -> SharedWeights:
    """Puts weights where processes of this user can attach to them, and attaches to them.

    The memory is charged once, to an account "share NAME" on the broker, and is never reclaimed: it is free
    when the last member has closed it or ended, whichever that is. A broker that ends takes no memory from
    members, but nobody can attach any more: share them again.

    Args:
        weights: tensors by name, as of `state_dict()`, or the path of a file of safetensors, which is read
            without being held in host memory.
        name: unique on the device, 1 to 48 bytes.
        arena: gets the memory; one that a broker serves. It may be closed afterwards.
        priority: of the demand for it: who has to yield.

    Returns:
        The weights, read-only as for everybody.

    Raises:
        InvalidArgument: no tensors, or such that cannot be shared; a file that is none of safetensors.
        InUseError: the name is taken. OutOfMemory: there is no room; nothing is shared.
        BrokerError: the arena stands alone, or the broker does not serve this.
    """
    if arena.broker is None:
        raise BrokerError(
            f"{arena!r} stands alone, and memory is shared through a broker; start `tem serve` first"
        )
    source: Weights = StateDict(weights) if isinstance(weights, Mapping) else SafetensorsFile(weights)
    if not source.slots:
        raise InvalidArgument("there are no tensors to share")
    device = _HOST if arena.backend == "host" else arena.uuid
    link = ShareLink(shares_socket(arena.broker))
    try:
        account = arena.account(f"share {name}", priority)
        try:
            header = _publish(source, name, account, device, link)
        finally:
            _close(account)
        return _map(name, arena.device, arena._backend, header, link)
    except BaseException:
        link.leave()
        raise


def attach(name: str, *, device: str = "cuda", broker: str = "auto") -> SharedWeights:
    """Maps what another process shares, until the last tensor of it is gone. It needs no arena, and no lease.

    Args:
        name: as given to `share`.
        device: "host" or "cuda:N", the device that it is on.
        broker: the path of the broker's socket, or "auto", as for an `Arena`.

    Raises:
        InvalidArgument: nobody shares it, or on another device; the message says what is there.
        BrokerError: no broker, or the weights are another user's.
        DriverMissing: there is no such device. DriverError: it cannot map the memory.
    """
    kind, index = device_of(device)
    backend = _C.host_backend(_LEAST) if kind == "host" else _C.cuda_backend(index, arenas.LIBCUDA)
    link = ShareLink(shares_socket(broker))
    try:
        descriptor, _ = link.attach(name, _HOST if kind == "host" else backend.uuid)
        try:
            header = _read(descriptor)
        finally:
            os.close(descriptor)
        return _map(name, "cpu" if kind == "host" else f"cuda:{index}", backend, header, link)
    except BaseException:
        link.leave()
        raise


def _publish(source: Weights, name: str, account: Account, device: str, link: ShareLink) -> Header:
    granularity = account.device.granularity
    blocks = max(1, -(-size_of(source.slots) // granularity))
    memory = _C.BlockRange(account._core, f"the weights '{name}'", blocks, granularity)
    try:
        memory.ensure(range(blocks), 0, account.device.seconds(None))
        _fill(memory, source)
        header = Header(memory.extents(), source.slots)
        descriptor = _sealed(msgspec.json.encode(header))
        try:
            link.publish(memory, name, account.name, device, descriptor)
        finally:
            os.close(descriptor)
        return header
    finally:
        # The broker has it now, and charges it to the share as it comes back from this account.
        memory.close()


def _fill(memory: _C.BlockRange, source: Weights) -> None:
    region = elastic_kv.bytes_tensor(memory.export_stripe(0))
    try:
        source.fill(region)
        if region.is_cuda:
            torch.cuda.current_stream(region.device).synchronize()
    except BaseException as error:
        # What its frames refer to would keep the memory in use.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        del region


def _map(name: str, device: str, backend: _C.Backend, header: Header, link: ShareLink) -> SharedWeights:
    memory = _C.Attached(backend, header.extents)
    if size_of(header.tensors) > memory.bytes:
        raise BrokerError(f"the header of '{name}' makes no sense: its tensors are larger than it is")
    link.fetch(memory, len(header.extents))
    memory.open()
    link.hand_over(memory)
    return SharedWeights(name, device, memory, header.tensors)


def _close(account: Account) -> None:
    deadline = time.monotonic() + _LAST_FENCE
    while True:
        try:
            account.close()
            return
        except InUseError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.001)


def _sealed(data: bytes) -> int:
    """A descriptor of bytes that nobody can change."""
    descriptor = os.memfd_create("torch_elastic_mem header", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _read(descriptor: int) -> Header:
    try:
        data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        return msgspec.json.decode(data, type=Header)
    except (OSError, msgspec.DecodeError) as error:
        raise BrokerError(f"what was shared has no header that makes sense: {error}") from None
