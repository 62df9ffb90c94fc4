"""Weights as they lie in shared memory: which tensor is where, and where they come from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from torch_elastic_mem.errors import InvalidArgument

# What every kernel's widest load wants.
ALIGNMENT = 256
# Of a file, in host memory at one time.
_CHUNK = 16 << 20
# The format's own bound on its header.
_LONGEST_HEADER = 100_000_000
# safetensors' names of dtypes.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


class Slot(msgspec.Struct, frozen=True):
    """A tensor's place.

    Attributes:
        dtype: as torch names it, without "torch.". shape: in elements. offset: in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size.

        Raises:
            InvalidArgument: this torch has no such dtype, or the shape is none.
        """
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or any(size < 0 for size in self.shape):
            raise InvalidArgument(
                f"this torch knows no {self.dtype} of shape {list(self.shape)}; use a newer one"
            )
        return math.prod(self.shape) * dtype.itemsize

    def view(self, raw: torch.Tensor) -> torch.Tensor:
        """The tensor in its bytes."""
        return raw.view(getattr(torch, self.dtype)).view(self.shape)


class Header(msgspec.Struct, frozen=True):
    """What members are told of a share: the sizes of its extents, and its tensors by name."""

    extents: list[int]
    tensors: dict[str, Slot]


class Weights(Protocol):
    """Where weights come from.

    Attributes:
        slots: where each tensor is to lie. Names with one slot are one tensor.
    """

    slots: dict[str, Slot]

    def fill(self, region: torch.Tensor) -> None:
        """Writes all of them into memory, as bytes."""


def size_of(slots: Mapping[str, Slot]) -> int:
    """The bytes that hold all slots."""
    return max((slot.offset + slot.nbytes for slot in slots.values()), default=0)


class StateDict:
    """Tensors of this process. Those that are one stay one; what is not contiguous is made so.

    Raises:
        InvalidArgument: something is no tensor, or none with plain memory.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.slots: dict[str, Slot] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        seen: dict[object, Slot] = {}
        end = 0
        for name, tensor in tensors.items():
            _check(name, tensor)
            dtype = str(tensor.dtype).removeprefix("torch.")
            same = (
                tensor.untyped_storage().data_ptr(),
                tensor.storage_offset(),
                tuple(tensor.shape),
                tensor.stride(),
                dtype,
            )
            slot = seen.get(same) if tensor.numel() else None
            if slot is None:
                slot = seen[same] = Slot(dtype, tuple(tensor.shape), end)
                end += -(-slot.nbytes // ALIGNMENT) * ALIGNMENT
                self._tensors[name] = tensor
            self.slots[name] = slot

    def fill(self, region: torch.Tensor) -> None:
        """Writes all of them into memory, as bytes."""
        for name, tensor in self._tensors.items():
            slot = self.slots[name]
            slot.view(region[slot.offset : slot.offset + slot.nbytes]).copy_(tensor.detach())


@dataclass(frozen=True, slots=True)
class _Stored:
    start: int
    nbytes: int


class SafetensorsFile:
    """A file of safetensors, read piece by piece: it takes 16 MiB of host memory, however large it is.

    Raises:
        InvalidArgument: it is no such file, or one of dtypes that torch does not have.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self.slots: dict[str, Slot] = {}
        self._stored: dict[str, _Stored] = {}
        end = 0
        with self._readable() as file:
            start, entries = self._header(file)
            data = os.fstat(file.fileno()).st_size - start
            for name, entry in entries.items():
                slot = Slot(_DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]), end)
                first, last = entry["data_offsets"]
                if not 0 <= first <= last <= data or last - first != slot.nbytes:
                    raise ValueError(f"tensor '{name}' is not where its header says")
                self._stored[name] = _Stored(start + first, last - first)
                self.slots[name] = slot
                end += -(-slot.nbytes // ALIGNMENT) * ALIGNMENT

    def fill(self, region: torch.Tensor) -> None:
        """Writes all of them into memory, as bytes."""
        buffer = bytearray(_CHUNK)
        chunk = torch.frombuffer(buffer, dtype=torch.uint8)
        with self._readable() as file:
            for name, stored in self._stored.items():
                file.seek(stored.start)
                at, end = self.slots[name].offset, self.slots[name].offset + stored.nbytes
                while at < end:
                    count = file.readinto(memoryview(buffer)[: min(_CHUNK, end - at)])
                    if not count:
                        raise ValueError("it has become shorter")
                    region[at : at + count].copy_(chunk[:count])
                    at += count

    @contextmanager
    def _readable(self) -> Iterator[FileIO]:
        try:
            with open(self._path, "rb", buffering=0) as file:
                yield file
        except InvalidArgument:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"{self._path} is no file of safetensors: {error}") from None

    @staticmethod
    def _header(file: FileIO) -> tuple[int, dict[str, Any]]:
        """Where the data begins, and the entries by name."""
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        entries = json.loads(file.read(length))
        if not isinstance(entries, dict):
            raise ValueError("its header is no object")
        entries.pop("__metadata__", None)
        return 8 + length, entries


def _check(name: object, tensor: object) -> None:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise InvalidArgument(f"weights are tensors by name; got {name!r}: {type(tensor).__name__}")
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    if not plain or type(tensor.detach()) not in (torch.Tensor, torch.nn.Parameter):
        raise InvalidArgument(
            f"'{name}' is a {type(tensor).__name__} of {tensor.layout} on {tensor.device}; only plain "
            f"tensors with memory of their own can be shared"
        )
