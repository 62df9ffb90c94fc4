"""Bytes of real text that every machine has: licence texts, and Python's own standard library."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_LICENCES = Path("/usr/share/common-licenses")
_LIMIT = 2 << 20


def corpus(limit: int = _LIMIT) -> bytes:
    """Returns up to `limit` bytes of text, the same on every call on one machine."""
    library = Path(os.__file__).parent
    files = sorted(path for path in _LICENCES.glob("*") if path.is_file() and not path.is_symlink())
    files += [*library.glob("LICENSE*"), *sorted(library.glob("*.py"))]
    text = bytearray()
    for path in files:
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return bytes(text[:limit])


class Text:
    """A corpus as byte tokens. What it draws depends on the arguments of the draw alone.

    Stateless after construction, so any thread may draw from it.
    """

    def __init__(self, data: bytes | None = None) -> None:
        self._tokens = torch.frombuffer(bytearray(corpus() if data is None else data), dtype=torch.uint8)

    def __len__(self) -> int:
        return self._tokens.numel()

    def _starts(self, seed: int, count: int, length: int) -> list[int]:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(len(self) - length, (count,), generator=draw).tolist()

    def batch(self, seed: int, sequences: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws training input and target, both int64 of shape `(sequences, length)` in CPU memory."""
        starts = self._starts(seed, sequences, length + 1)
        rows = torch.stack([self._tokens[start : start + length + 1] for start in starts]).long()
        return rows[:, :-1], rows[:, 1:]

    def prompt(self, seed: int, length: int) -> list[int]:
        """Draws one prompt of `length` tokens."""
        (start,) = self._starts(seed, 1, length)
        return self._tokens[start : start + length].tolist()
