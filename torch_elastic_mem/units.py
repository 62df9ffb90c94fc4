"""Byte counts as people write them."""

from __future__ import annotations

import re

from torch_elastic_mem.errors import InvalidArgument

_DECIMAL: dict[str, int] = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
_BINARY: dict[str, int] = {unit: 1024**power for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))}
_UNITS = _DECIMAL | _BINARY
_FACTORS = {unit.lower(): factor for unit, factor in _UNITS.items()}
_TEXT = re.compile(r"\s*(?P<whole>[0-9]+)(?:\.(?P<part>[0-9]+))?\s*(?P<unit>[a-z]*)\s*", re.IGNORECASE)

# The core counts in 64 bits and subtracts, so the top bit stays free.
_LARGEST = 2**63 - 1


def parse_bytes(size: int | str) -> int:
    """Reads a number of bytes.

    Args:
        size: a count of bytes, or a text such as "40GiB", "1.5 GB" or "4096". KB, MB, GB and TB are powers of
            1000, KiB, MiB, GiB and TiB powers of 1024; upper and lower case are the same.

    Returns:
        Bytes, not negative; a fraction of a byte is dropped.

    Raises:
        InvalidArgument: `size` is negative, beyond 64 bits, or not a size.
    """
    if isinstance(size, str):
        count = _parse(size)
    elif isinstance(size, int) and not isinstance(size, bool):
        count = size
    else:
        raise InvalidArgument(f"{size!r} is not a size: give bytes as an int, or a text such as '4GiB'")
    if not 0 <= count <= _LARGEST:
        raise InvalidArgument(f"{size!r} is not a size: it must be between 0 and {_LARGEST} bytes")
    return count


def _parse(text: str) -> int:
    found = _TEXT.fullmatch(text)
    factor = _FACTORS.get((found["unit"] or "B").lower()) if found else None
    # Longer texts are beyond 64 bits, or are digits that int() would take long over.
    if not found or factor is None or len(text) > 64:
        shown = text if len(text) <= 64 else f"{text[:61]}..."
        units = ", ".join(_UNITS)
        raise InvalidArgument(f"{shown!r} is not a size: write a number and one of {units}, as in '4GiB'")
    part = found["part"] or ""
    scale: int = 10 ** len(part)
    return int(found["whole"]) * factor + int(part or 0) * factor // scale


def format_bytes(count: int) -> str:
    """Writes a number of bytes for people: "40 GiB", "1.50 MiB", "17 B".

    Args:
        count: bytes, not negative.

    Returns:
        A text for reading, not for parsing back: the largest binary unit that leaves at least 1, and no
        decimals or two.

    Raises:
        InvalidArgument: `count` is negative.
    """
    if count < 0:
        raise InvalidArgument(f"{count} bytes is not a size: it must not be negative")
    unit, factor = [pair for pair in _BINARY.items() if pair[1] <= max(count, 1)][-1]
    whole, rest = divmod(count, factor)
    return f"{count / factor:.2f} {unit}" if rest else f"{whole} {unit}"
