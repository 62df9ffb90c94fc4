"""A process that shares and attaches: `python -m tests.shared.member BROKER DEVICE [LIBCUDA]`.

A line of stdin is a list, a command and its arguments, as JSON; the answer is a line as well: a list with a
value, or with an error's class and text.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
from typing import Any

import torch

import torch_elastic_mem as tem
import torch_elastic_mem.arena
import torch_elastic_mem.elastic_kv
from tests.rungs import _bytes_tensor_on_cpu
from tests.shared.samples import sample


class Member:
    def __init__(self, broker: str, device: str) -> None:
        self.broker = broker
        self.device = device
        self.weights: Any = None
        self.kept: Any = None

    def share(self, name: str, seed: int = 0) -> str:
        with tem.Arena(self.device, capacity="256MiB", broker=self.broker) as arena:
            self.weights = tem.share(sample(seed), name, arena=arena)
        return "shared"

    def attach(self, name: str) -> str:
        self.weights = tem.attach(name, device=self.device, broker=self.broker)
        return "attached"

    def same(self, seed: int = 0) -> bool:
        wanted = sample(seed)
        return list(wanted) == list(self.weights) and all(
            torch.equal(
                wanted[name].contiguous().view(-1).view(torch.uint8), given.cpu().view(-1).view(torch.uint8)
            )
            and (wanted[name].dtype, wanted[name].shape) == (given.dtype, given.shape)
            for name, given in self.weights.items()
        )

    def read_only(self) -> bool:
        return bool(self.weights.read_only)

    def keep(self, name: str) -> str:
        self.kept = self.weights[name]
        return "kept"

    def drop(self) -> str:
        self.kept = None
        return "dropped"

    def close(self) -> str:
        self.weights.close()
        return "closed"

    def write(self, name: str, by: str) -> str:
        """Everything that may write: a kernel, the driver's memset, a copy. Waits for the GPU to say so."""
        tensor = self.weights[name].view(-1)
        if by == "kernel":
            tensor.fill_(1)
        elif by == "copy":
            tensor.copy_(torch.ones_like(tensor, device="cpu"))
        else:
            memset(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        return "written"

    def files(self, count: int) -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
        return "limited"


def memset(tensor: torch.Tensor) -> None:
    if not tensor.is_cuda:
        ctypes.memset(tensor.data_ptr(), 1, tensor.nbytes)
        return
    from cuda.bindings import driver

    (error,) = driver.cuMemsetD8(tensor.data_ptr(), 1, tensor.nbytes)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuMemsetD8: {error!r}")


def main() -> None:
    _, broker, device, library = sys.argv
    if library:
        torch_elastic_mem.arena.LIBCUDA = library
        torch_elastic_mem.elastic_kv.bytes_tensor = _bytes_tensor_on_cpu
    member = Member(broker, device)
    print(json.dumps(["ready"]), flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            answer = [getattr(member, command)(*arguments)]
        except (tem.TemError, RuntimeError) as error:
            answer = [type(error).__name__, str(error)]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
