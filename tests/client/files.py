"""The host's and the fake driver's memory is files: which are mapped, and who has them open."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def file_under(address: int) -> int:
    """The inode of what is mapped there; 0 for nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        begin, end = (int(each, 16) for each in span.split("-"))
        if begin <= address < end:
            return int(inode)
    return 0


def descriptors_of(files: set[int]) -> int:
    """How many this process has of these inodes."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            count += os.stat(f"/proc/self/fd/{name}").st_ino in files
    return count
