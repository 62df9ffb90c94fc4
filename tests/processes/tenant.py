"""A process with an arena of its own that does what it is told, line by line.

Each line on its standard input is a JSON list of a command and its arguments; each answer is a JSON value.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch_elastic_mem as tem
from torch_elastic_mem import arena

MiB = 1 << 20
EXTENT = 4 * MiB


class Tenant:
    def __init__(self, device: str, priority: str, keep: bool) -> None:
        self.arena = tem.Arena(device, capacity="1GiB")
        self.account = self.arena.account(priority, priority)
        self.memory = self.account.range("1GiB", keep="1GiB" if keep else 0, extent=EXTENT)
        self.asked: list[int] = []
        self.entered = threading.Event()
        self.training: threading.Thread | None = None
        self.losses: list[float] = []

    def grow(self, nbytes: int, timeout: float = 10.0) -> int:
        start = self.memory.mapped
        self.memory.grow(nbytes, timeout=timeout)
        if self.arena.backend == "host":
            mine = os.getpid() % 255 + 1
            for at in range(start, start + nbytes, EXTENT):
                found = ctypes.string_at(self.memory.address + at, 64)
                assert found in (bytes(64), bytes([mine] * 64)), "memory of another tenant"
                ctypes.memset(self.memory.address + at, mine, 64)
        return self.account.held

    def shrink(self, nbytes: int) -> int:
        self.memory.shrink(nbytes)
        return self.account.held

    def wall_clock(self) -> float:
        return time.time()

    def held(self) -> int:
        return self.account.held

    def reclaimer(self, rung: str, seconds: float = 0.0) -> None:
        """Registers one that frees what it is asked for, after a while."""

        def free(nbytes: int, timeout: float) -> None:
            self.asked.append(nbytes)
            self.entered.set()
            time.sleep(seconds)
            self.memory.shrink(min(nbytes + (-nbytes) % EXTENT, self.memory.mapped))

        self.account.on_reclaim(free, rung)

    def was_asked(self) -> list[int]:
        return self.asked

    def await_asked(self) -> bool:
        return self.entered.wait(20)

    def hold_gil(self) -> None:
        """Answers first, then keeps every Python thread of the process waiting until the next command."""
        print("null", flush=True)
        ctypes.PyDLL(None).poll(struct.pack("ihh", sys.stdin.fileno(), select.POLLIN, 0), 1, -1)

    def fork(self) -> int:
        """A child that sleeps, with all that it inherited."""
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        return pid

    def reserve(self, nbytes: int, group: str, members: int, turn: int, timeout: float = 10.0) -> int:
        self.account.reserve(nbytes, group=tem.Group(group, members, turn), timeout=timeout)
        return self.account.held

    def train(self) -> None:
        """A small model that trains on the arena until `trained`."""
        import torch

        self.running = True

        def run() -> None:
            torch.manual_seed(0)
            with self.account.allocations():
                model = torch.nn.Sequential(
                    torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256)
                )
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
                while self.running:
                    torch.manual_seed(len(self.losses))
                    loss = model(torch.randn(256, 256)).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    self.losses.append(loss.item())

        self.training = threading.Thread(target=run)
        self.training.start()

    def steps(self) -> int:
        return len(self.losses)

    def trained(self) -> list[float]:
        assert self.training is not None
        self.running = False
        self.training.join()
        return self.losses

    def cut(self) -> int:
        """Ends the connection to the broker; returns how many there were."""
        ended = 0
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as end:
                if end.getpeername() == self.arena.broker:
                    end.shutdown(socket.SHUT_RDWR)
                    ended += 1
        return ended

    def close_account(self) -> None:
        self.memory.close()
        self.account.close()

    def close(self) -> None:
        self.close_account()
        self.arena.close()


def main(device: str, priority: str, keep: str, library: str = "") -> None:
    if library:
        arena.LIBCUDA = library
    tenant = Tenant(device, priority, keep == "keep")
    print(json.dumps(os.getpid()), flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer: Any
        try:
            answer = getattr(tenant, command)(*arguments)
        except tem.TemError as error:
            answer = {"error": type(error).__name__, "says": str(error)}
        if command != "hold_gil":
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
