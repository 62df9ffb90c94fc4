"""The other process of test_share.py: opens what is shared with it, as lines of JSON on stdin ask.

`python -m tests.alloc.share_peer DEVICE [LIBCUDA]`. A line is a list, a command and its arguments; the answer
is a line of JSON as well, a list with a value, or with an error's class and text.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import torch_elastic_mem as tem
import torch_elastic_mem.arena
from torch_elastic_mem import _C

MiB = 1 << 20


class Peer:
    def __init__(self, device: str) -> None:
        self.arena = tem.Arena(device, capacity=64 * MiB, reserve=(0, 0))
        self.account = self.arena.account("peer")
        self.heap = _C.Allocator(self.account._core, "peer")
        self.open_at: dict[int, Any] = {}

    def open(self, handle: str) -> int:
        memory = self.heap.open_shared(bytes.fromhex(handle))
        self.open_at[len(self.open_at)] = memory
        return int(memory.address)

    def close(self, number: int) -> int:
        self.open_at[number].close()
        return len(self.open_at)

    def read(self, address: int, count: int) -> str:
        return ctypes.string_at(address, count).hex()

    def write(self, address: int, data: str) -> int:
        ctypes.memmove(address, bytes.fromhex(data), len(data) // 2)
        return 0

    def share(self, data: str) -> list[Any]:
        """A block of 3 MiB that begins with these bytes."""
        address = self.heap.allocate(3 * MiB, 0)
        self.write(address, data)
        handle, offset = self.heap.share(address)
        return [handle.hex(), offset, address]

    def free(self, address: int) -> int:
        self.heap.free(address)
        return 0

    def held(self) -> int:
        return self.account.held

    def live(self) -> list[int]:
        """Handles, mappings and reservations of the fake driver."""
        driver = ctypes.CDLL(torch_elastic_mem.arena.LIBCUDA)
        counts = [ctypes.c_size_t() for _ in range(4)]
        driver.fake_cuda_live(*(ctypes.byref(count) for count in counts))
        return [count.value for count in counts[:3]]


def main() -> None:
    if len(sys.argv) > 2:
        torch_elastic_mem.arena.LIBCUDA = sys.argv[2]
    peer = Peer(sys.argv[1])
    print("[0]", flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            answer = [getattr(peer, command)(*arguments)]
        except tem.TemError as error:
            answer = [type(error).__name__, str(error)]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
