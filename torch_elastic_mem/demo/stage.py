"""What a tenant runs on: an arena, an account in it, and what both tenants were given alike."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

import torch_elastic_mem as tem
from torch_elastic_mem.demo.bursts import Arrival
from torch_elastic_mem.demo.decoder import PagedDecoder
from torch_elastic_mem.demo.model import Weights
from torch_elastic_mem.demo.scale import Scale
from torch_elastic_mem.demo.server import Server
from torch_elastic_mem.demo.text import Text
from torch_elastic_mem.demo.trainer import Trainer


@dataclass(frozen=True)
class Stage:
    """One tenant's; the other's may be in the same arena or in another process."""

    arena: tem.Arena
    account: tem.Account
    scale: Scale
    initial: torch.Tensor
    text: Text

    def trainer(
        self, boundary: Callable[[], None] | None = None, cold: torch.Tensor | None = None
    ) -> Trainer:
        """Builds a trainer in the memory that the calling thread allocates from."""
        return Trainer(self.scale, self.initial, self.text, self.arena.device, boundary=boundary, cold=cold)

    def weights(self) -> Weights:
        """Copies the first weights, for serving, into the memory that the calling thread allocates from."""
        return Weights(self.scale.shape, self.initial.to(self.arena.device, copy=True))

    def server(self, arrivals: list[Arrival], blocks: int | None = None) -> Server:
        """Builds a server whose weights and cache are charged to the account.

        Args:
            arrivals: What it is to serve.
            blocks: Blocks of its cache; by default as many as the whole capacity could back.
        """
        shape, block_tokens = self.scale.shape, self.scale.block_tokens
        with self.account.allocations():
            weights = self.weights()
        kv = tem.ElasticKVTensor(
            self.account,
            blocks or self.scale.capacity // self.scale.block_bytes,
            (2, block_tokens, shape.heads, shape.head_dim),
            torch.float32,
            layers=shape.layers,
        )
        return Server(kv, PagedDecoder(weights, kv, block_tokens), arrivals, block_tokens)

    def serve(self, server: Server, stop: threading.Event) -> None:
        """Runs a server on the calling thread, in the account and on a stream of its own."""
        with self.account.allocations():
            if self.arena.backend == "cuda":
                stream = torch.cuda.Stream(self.arena.device)
                stream.wait_stream(torch.cuda.default_stream(self.arena.device))
                with torch.cuda.stream(stream):
                    server.run(stop)
                stream.synchronize()
            else:
                server.run(stop)

    def used(self) -> int:
        """Bytes of the account that something lives in."""
        for account in self.arena.snapshot().accounts:
            if account.name == self.account.name:
                return account.held - account.idle
        return 0

    def close(self) -> None:
        """Closes the account.

        Raises:
            InUseError: something lives in it; it stays open.
        """
        if self.arena.backend == "cuda":
            torch.cuda.synchronize()
            # Each thread's cuBLAS handle keeps a workspace from torch's allocator.
            torch._C._cuda_clearCublasWorkspaces()
        self.account.close()
