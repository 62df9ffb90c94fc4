"""`ElasticKVTensor`: a plain tensor of full size, with memory only under the blocks in use."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from types import TracebackType

import torch

from torch_elastic_mem import _C
from torch_elastic_mem.account import Account
from torch_elastic_mem.errors import BlockError, ClosedError, InvalidArgument, NotResident, TemError
from torch_elastic_mem.residency_check import ResidencyCheck
from torch_elastic_mem.units import parse_bytes

LAYOUTS = ("block", "layer")


class ElasticKVTensor:
    """A KV cache whose addresses are all there from the start and whose memory follows the blocks in use.

    With the layout "block" one tensor holds everything, the block outermost, so that a block's bytes in all
    layers lie together. With "layer" every layer has a tensor of its own; a block then has bytes in each,
    and the extents of all layers come and go together.

    Reading or writing a block that is not resident is an access to unmapped memory: a fault on the host, an
    illegal address on CUDA. Within `with kv.checked():` it is caught before, with a clear error.

    Thread-safe.

    Args:
        account: whom the memory is charged to.
        num_blocks: blocks of the whole cache, as many as could ever be useful.
        block_shape: the shape of one block (of one layer, where `layers` is given), in elements.
        dtype: any torch dtype of whole bytes.
        layers: layers of the model; needed for the layout "layer".
        layout: "block" or "layer".
        keep: idle bytes that stay mapped until somebody needs them; an int or a text such as "1GiB".
        extent: the size of every extent, a power of two from the device's granularity to 64 MiB, for a caller
            that gives blocks back in groups of that size; 0: the arena chooses.

    Attributes:
        tensors: with "block" one tensor of shape (num_blocks, *block_shape), or (num_blocks, layers,
            *block_shape); with "layer" one of shape (num_blocks, *block_shape) a layer. Made without
            copying, contiguous.

    Raises:
        InvalidArgument: a shape, dtype, layout or size that cannot be right.
    """

    def __init__(
        self,
        account: Account,
        num_blocks: int,
        block_shape: Sequence[int],
        dtype: torch.dtype,
        *,
        layers: int | None = None,
        layout: str = "block",
        keep: int | str = 0,
        extent: int | str = 0,
    ) -> None:
        shape = _shape(num_blocks, block_shape, layers, layout, dtype)
        stripes = layers if layout == "layer" and layers is not None else 1
        self._account = account
        self.num_blocks = num_blocks
        self.layers = layers
        self.layout = layout
        self.dtype = dtype
        self.shape = shape
        # torch.cuda.current_stream builds a Stream object, which costs ten times what ensure() does.
        on_cuda = account.device.backend == "cuda" and torch.cuda.is_available()
        self._device_index = account.device.index if on_cuda else None
        self.name = f"a KV cache of {num_blocks} blocks of {account.name}"
        self._stripe_block_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._core = _C.BlockRange(
            account._core,
            self.name,
            num_blocks,
            self._stripe_block_bytes,
            stripes=stripes,
            keep=parse_bytes(keep),
            extent_bytes=parse_bytes(extent),
        )
        self._block_bytes = self._stripe_block_bytes * stripes
        self.tensors = [self._tensor(stripe) for stripe in range(stripes)]

    def _tensor(self, stripe: int) -> torch.Tensor:
        flat = bytes_tensor(self._core.export_stripe(stripe))
        return flat.view(self.dtype).view(self.shape)

    def __repr__(self) -> str:
        where = f"{self.layout} layout on {self._account.device.name}"
        return f"<ElasticKVTensor {self.shape} {self.dtype} in {where}>"

    def __enter__(self) -> ElasticKVTensor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    @property
    def tensor(self) -> torch.Tensor:
        """The one tensor of the layout "block".

        Raises:
            InvalidArgument: the layout is "layer"; use `tensors` or `layer(i)`.
        """
        if self.layout != "block":
            raise InvalidArgument("a KV cache in 'layer' layout has a tensor a layer: use layer(i)")
        return self._open_tensors()[0]

    def layer(self, index: int) -> torch.Tensor:
        """The tensor of one layer, of shape (num_blocks, *block_shape); a view in the layout "block".

        Raises:
            InvalidArgument: no such layer, or a cache made without layers.
        """
        if self.layers is None or not 0 <= index < self.layers:
            raise InvalidArgument(f"no layer {index} in a cache of {self.layers or 0} layers")
        tensors = self._open_tensors()
        return tensors[index] if self.layout == "layer" else tensors[0][:, index]

    def _open_tensors(self) -> list[torch.Tensor]:
        if not self.tensors:
            raise ClosedError(f"{self.name} has been closed")
        return self.tensors

    @property
    def account(self) -> Account:
        """Whom it is charged to."""
        return self._account

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, in all layers."""
        return self._block_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory under the cache; the account is charged for them."""
        return self._core.resident_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks that are held."""
        return self._core.held_blocks * self.block_bytes

    def is_resident(self, block: int) -> bool:
        """Whether all of the block's bytes are mapped.

        Raises:
            BlockError: out of range.
        """
        try:
            return self._core.resident(block)
        except TypeError:
            raise BlockError(f"{self.name}: block {block!r} is no block number") from None

    def ensure(self, blocks: Iterable[int], *, timeout: float | None = None, rung: str = "pause") -> None:
        """Makes blocks resident and held; those held already stay so. All or nothing.

        Memory that another tenant wrote to reads as zeros, in the order of the current stream. Lower classes
        yield if they must. For blocks that are held already it costs about a microsecond and takes no lock
        but the cache's own.

        Args:
            blocks: block numbers.
            timeout: seconds to wait for others to yield; None: the arena's `yield_timeout`.
            rung: the dearest that others are asked for. "trim": what nobody uses; "evict": what can be had
                again, as cached prefixes; "spill", "shrink" and "pause" cost those their work.

        Raises:
            InvalidArgument: no such rung. BlockError: a block out of range. OutOfMemory: the memory is not
                to be had. Everything is as before.
        """
        self._core.ensure(blocks, self.stream(), self._account.device.seconds(timeout), rung)

    def release(self, blocks: Iterable[int]) -> None:
        """Lets held blocks go. Work on the current stream so far may still touch them; memory goes after it.

        An extent is given back when the last block on it goes, beyond `keep` idle bytes.

        Raises:
            BlockError: a block that is out of range, not held, or named twice. All are held as before.
        """
        self._core.release(blocks, self.stream())

    def stream(self) -> int:
        """The current CUDA stream as the driver knows it; 0 on the host."""
        return 0 if self._device_index is None else torch._C._cuda_getCurrentRawStream(self._device_index)

    def copy_blocks(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies blocks (from, to), all layers, on the current stream.

        No destination may be a source as well.

        Raises:
            BlockError: a block out of range. NotResident: one without memory. Nothing was copied.
        """
        pairs = list(copies)
        if not pairs:
            return
        if absent := {block for pair in pairs for block in pair if not self.is_resident(block)}:
            raise NotResident(
                f"{self.name}: blocks {sorted(absent)} have no memory to copy from or to; ensure() them"
            )
        if {source for source, _ in pairs} & {target for _, target in pairs}:
            raise InvalidArgument(
                "copies whose destination is a source as well depend on their order; split them"
            )
        # As bytes: torch copies no integers of less than one.
        views = [tensor.view(self.num_blocks, -1).view(torch.uint8) for tensor in self._open_tensors()]
        for source, target in pairs:
            for view in views:
                view[target].copy_(view[source])

    def checked(self) -> ResidencyCheck:
        """Debug mode: within `with kv.checked():` this thread's operations on the tensors are checked first.

        Raises:
            NotResident: within the block, by an operation that would touch a block without memory behind it.
        """
        regions = [(tensor.untyped_storage().data_ptr(), self._stripe_block_bytes) for tensor in self.tensors]
        return ResidencyCheck(self.name, regions, self.is_resident)

    def close(self) -> None:
        """Gives everything back. Harmless the second time.

        Raises:
            InUseError: tensors over it or their views live; delete them first. It stays open.
        """
        tensors, self.tensors = self.tensors, []
        count = len(tensors)
        del tensors
        try:
            self._core.close()
        except TemError:
            self.tensors = [self._tensor(stripe) for stripe in range(count)]
            raise


def bytes_tensor(capsule: object) -> torch.Tensor:
    """A DLPack capsule of bytes as a torch tensor, without copying."""
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
    return tensor


def _shape(
    num_blocks: int, block_shape: Sequence[int], layers: int | None, layout: str, dtype: torch.dtype
) -> tuple[int, ...]:
    if not isinstance(dtype, torch.dtype):
        raise InvalidArgument(f"unknown dtype {dtype!r}: give a torch.dtype")
    if str(dtype).startswith(("torch.qint", "torch.quint")):
        raise InvalidArgument(
            f"{dtype} carries its scale outside the bytes: use the integer dtype beneath it"
        )
    if layout not in LAYOUTS:
        raise InvalidArgument(f"unknown layout {layout!r}: use one of {', '.join(LAYOUTS)}")
    if layout == "layer" and layers is None:
        raise InvalidArgument("the layout 'layer' needs the number of layers")
    if not isinstance(block_shape, Sequence) or isinstance(block_shape, str):
        raise InvalidArgument(f"block_shape is {block_shape!r}; it is a sequence of sizes")
    sizes = {"num_blocks": num_blocks, "layers": 1 if layers is None else layers}
    sizes |= {f"block_shape[{i}]": size for i, size in enumerate(block_shape)}
    for name, size in sizes.items():
        try:
            valid = operator.index(size) > 0
        except TypeError:
            valid = False
        if not valid:
            raise InvalidArgument(f"{name} is {size!r}; sizes are positive integers")
    total = math.prod(sizes.values()) * dtype.itemsize
    if total >= 2**47:
        raise InvalidArgument(f"a KV cache of {total} bytes exceeds the address space of 128 TiB")
    inner = tuple(block_shape)
    if layers is None or layout == "layer":
        return (num_blocks, *inner)
    return (num_blocks, layers, *inner)
