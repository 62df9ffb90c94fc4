"""What bench_train trains: decoders of GPT's kind, and ResNet-50. Weights and data come from seeds."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WEIGHT_SEED = 20
_DATA_SEED = 21


class Shape(msgspec.Struct, frozen=True):
    """A decoder and its batch; `steps` of them are run, the first `warmup` of which are not timed."""

    layers: int
    width: int
    heads: int
    batch: int
    steps: int
    vocabulary: int = 50304
    longest: int = 2048

    @property
    def warmup(self) -> int:
        """Steps before the first that is timed."""
        return max(1, self.steps // 4)


SHAPES = {
    "gpt-124m": Shape(12, 768, 12, batch=32, steps=24),
    "gpt-1b": Shape(18, 2048, 16, batch=14, steps=12),
    "gpt-tiny": Shape(2, 64, 2, batch=2, steps=40, vocabulary=256, longest=128),
}
# Its "length" is the batch.
RESNET = "resnet-50"
RESNET_STEPS = 12
RESNET_BATCH = 256
SIDE = 224


class Job(Protocol):
    """A model with its optimizer and its data."""

    def step(self, length: int) -> Tensor:
        """Trains on the next batch; its loss, not waited for."""

    def samples(self, length: int) -> int:
        """Tokens or pictures in a batch of that length."""


class Block(nn.Module):
    """A pre-norm decoder block."""

    def __init__(self, width: int, heads: int, **where: Any) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width, **where)
        self.qkv = nn.Linear(width, 3 * width, **where)
        self.out = nn.Linear(width, width, **where)
        self.before_mlp = nn.LayerNorm(width, **where)
        self.up = nn.Linear(width, 4 * width, **where)
        self.down = nn.Linear(4 * width, width, **where)

    def forward(self, x: Tensor) -> Tensor:
        """A batch of sequences through attention and MLP."""
        batch, length, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return cast(Tensor, x + self.down(F.gelu(self.up(self.before_mlp(x)), approximate="tanh")))


class Gpt(nn.Module):
    """A decoder with learned positions and tied embeddings."""

    def __init__(self, shape: Shape, **where: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width, **where)
        self.positions = nn.Parameter(torch.empty(shape.longest, shape.width, **where))
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads, **where) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, **where)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of every next token."""
        x = self.tokens(tokens[:, :-1])
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class GptJob:
    """Steps of a decoder in bfloat16, on random tokens."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(_WEIGHT_SEED)
        self._shape = shape
        self._device = device
        self._data = torch.Generator(device).manual_seed(_DATA_SEED)
        self._model = Gpt(shape, device=device, dtype=torch.bfloat16)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)

    def step(self, length: int) -> Tensor:
        """Trains on a batch of sequences of `length` tokens."""
        tokens = torch.randint(
            self._shape.vocabulary,
            (self._shape.batch, length + 1),
            generator=self._data,
            device=self._device,
        )
        with _attention(self._device):
            loss: Tensor = self._model(tokens)
        # Gone before backward, as in a loop that reads its batch from a loader.
        del tokens
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def samples(self, length: int) -> int:
        """Tokens of a batch."""
        return self._shape.batch * length


class ResNetJob:
    """Steps of ResNet-50 in channels_last under bfloat16 autocast, on random pictures."""

    def __init__(self, device: torch.device) -> None:
        models = importlib.import_module("torchvision.models")
        torch.manual_seed(_WEIGHT_SEED)
        self._device = device
        self._data = torch.Generator(device).manual_seed(_DATA_SEED)
        with device:
            model = models.resnet50()
        self._model: nn.Module = model.to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)

    def step(self, length: int) -> Tensor:
        """Trains on `length` pictures."""
        pictures = torch.randn(length, 3, SIDE, SIDE, generator=self._data, device=self._device)
        pictures = pictures.to(memory_format=torch.channels_last)
        labels = torch.randint(1000, (length,), generator=self._data, device=self._device)
        with torch.autocast(self._device.type, torch.bfloat16):
            loss = F.cross_entropy(self._model(pictures), labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def samples(self, length: int) -> int:
        """Pictures of a batch."""
        return length


def make_job(model: str, device: torch.device, batch: int | None = None) -> Job:
    """A fresh job; equal for equal arguments.

    Raises:
        ModuleNotFoundError: ResNet-50 is asked for and torchvision is not installed.
    """
    # Else deterministic algorithms fill uninitialised memory, with kernels that no training has.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Max pooling has no deterministic backward.
    torch.use_deterministic_algorithms(True, warn_only=model == RESNET)
    torch.backends.cudnn.deterministic = True
    if model == RESNET:
        return ResNetJob(device)
    shape = SHAPES[model]
    return GptJob(shape if batch is None else msgspec.structs.replace(shape, batch=batch), device)


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """One kernel of attention for every contender, with a backward that repeats its bits."""
    if device.type != "cuda":
        return nullcontext()
    attention = importlib.import_module("torch.nn.attention")
    chosen: AbstractContextManager[None] = attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION)
    return chosen
