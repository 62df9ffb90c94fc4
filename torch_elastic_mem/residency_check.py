"""Debug mode of a KV cache: refuses torch operations that would touch blocks without memory behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_elastic_mem.errors import NotResident

# Operations that read or write only the rows their indices name, with the argument that holds the indices.
# Their first argument is the tensor that is indexed, along dimension 0 where a `dim` argument says so.
_BY_ROWS = {
    "aten::index_select": 2,
    "aten::index_copy_": 2,
    "aten::index_add_": 2,
    "aten::index_fill_": 2,
}
_BY_INDICES = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")
# Operations that ask a tensor for its shape, dtype or device alone.
_BY_SHAPE = {
    f"aten::{name}"
    for name in (
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
        *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
        *("detach", "size", "sym_size", "is_pinned", "is_same_size", "record_stream"),
    )
}
# Methods that read a tensor's memory by other means than an ATen operation that a mode would see.
_READERS = (torch.Tensor.__repr__, torch.Tensor.tolist)


class ResidencyCheck(TorchDispatchMode):
    """A context manager, active on the thread that enters it. Made by `ElasticKVTensor.checked`.

    Every ATen operation that reads or writes memory is checked: the blocks that the tensors' strides reach,
    or those that an index names. Views and shape questions touch nothing. Operations from outside ATen see
    the whole cache and choose blocks by tables of their own; they are let through.
    """

    def __init__(
        self, name: str, regions: Iterable[tuple[int, int]], is_resident: Callable[[int], bool]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = name
        self._block_bytes = dict(regions)  # by address of the storage
        self._is_resident = is_resident
        self._readers = _Readers(self)

    def __enter__(self) -> ResidencyCheck:
        self._readers.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._readers.__exit__(*error)  # type: ignore[no-untyped-call]

    def check_reader(self, name: str, tensor: torch.Tensor) -> None:
        """Refuses a method that reads all of a tensor's elements."""
        self._refuse(name, self._reached(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and not _is_view(func):
            self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func._schema.name
        for position, argument in enumerate(args):
            for tensor in _tensors(argument):
                if position == 0 and _touches_whole(name, tensor, args):
                    self._refuse(name, self._reached(tensor))
                elif position == 0 and name in _BY_INDICES:
                    self._refuse(name, self._indexed(tensor, args[1]))
                elif position == 0 and name in _BY_ROWS and args[1] == 0:
                    self._refuse(name, self._rows(tensor, args[_BY_ROWS[name]]))
                else:
                    self._refuse(name, self._reached(tensor))
        for tensor in _tensors(kwargs):
            self._refuse(name, self._reached(tensor))

    def _refuse(self, operation: str, blocks: Iterable[int]) -> None:
        absent = [block for block in blocks if not self._is_resident(block)]
        if not absent:
            return
        shown = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        raise NotResident(
            f"{operation} would touch {len(absent)} blocks without memory in {self._name}: {shown}; "
            "call ensure() for them first, or index only the blocks that are held"
        )

    def _ours(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self._block_bytes

    def _reached(self, tensor: torch.Tensor) -> Iterable[int]:
        """The blocks that a tensor's elements lie in; exact unless several dimensions stride in a block."""
        if not self._ours(tensor):
            return ()
        item = tensor.element_size()
        size = self._block_bytes[tensor.untyped_storage().data_ptr()]
        starts = {tensor.storage_offset() * item}
        extent = item  # bytes from a start to the end of what is reached without skipping a block
        for stride, length in zip(tensor.stride(), tensor.size(), strict=True):
            if stride * item >= size:
                starts = {start + i * stride * item for start in starts for i in range(length)}
            else:
                extent += (length - 1) * stride * item
        return sorted({b for at in starts for b in range(at // size, (at + extent - 1) // size + 1)})

    def _rows(self, tensor: torch.Tensor, index: torch.Tensor) -> Iterable[int]:
        if not self._ours(tensor):
            return ()
        count = tensor.size(0)
        blocks: set[int] = set()
        for row in {i % count for i in index.flatten().tolist() if -count <= i < count}:
            blocks.update(self._reached(tensor.detach().select(0, row)))
        return sorted(blocks)

    def _indexed(self, tensor: torch.Tensor, indices: Any) -> Iterable[int]:
        first = indices[0] if indices else None
        if not isinstance(first, torch.Tensor):
            return self._reached(tensor)
        if _is_mask(first):
            first = first.nonzero()[:, 0]
        return self._rows(tensor, first)


class _Readers(TorchFunctionMode):
    def __init__(self, check: ResidencyCheck) -> None:
        super().__init__()
        self._check = check

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READERS:
            self._check.check_reader(f"Tensor.{func.__name__}", args[0])
        return func(*args, **(kwargs or {}))


def _touches_whole(name: str, tensor: torch.Tensor, args: tuple[Any, ...]) -> bool:
    """Whether CUDA goes through all of a tensor of which the caller names rows.

    Where it sorts the indices (to accumulate, or to be deterministic) it makes the tensor contiguous first.
    One number written through a mask is a masked_fill, which reads and writes back what the mask leaves out.
    """
    if not tensor.is_cuda or not name.endswith("_"):
        return False
    if name in _BY_INDICES and all(map(_is_mask, args[1])) and args[2].numel() == 1 and args[2].is_cpu:
        return True
    accumulates = name in _BY_INDICES and len(args) > 3 and bool(args[3])
    return not tensor.is_contiguous() and (accumulates or torch.are_deterministic_algorithms_enabled())


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_view(func: Any) -> bool:
    """An operation that touches no memory: it aliases its input without writing, or returns no tensor."""
    schema = func._schema
    returns_alias = any(
        value.alias_info is not None and not value.alias_info.is_write for value in schema.returns
    )
    return returns_alias or schema.name in _BY_SHAPE


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
