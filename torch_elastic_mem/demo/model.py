"""A decoder-only transformer over bytes, written as functions of its weights.

Training, serving with a paged cache and the check without a cache share `forward`: they differ in the
`attend` they hand it. So what is proved equal at the end of the demo went through one and the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

VOCABULARY = 256
FLOAT_BYTES = 4

# Takes the layer's number and its queries, keys and values, (batch, tokens, 3, heads, head_dim); returns
# (batch, tokens, width).
Attend = Callable[[int, torch.Tensor], torch.Tensor]
Boundary = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. `context` is the longest sequence, in tokens."""

    layers: int
    width: int
    heads: int
    context: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yields the (rows, columns) of each weight; a norm's gain has one row."""
        yield VOCABULARY, self.width
        for _ in range(self.layers):
            yield 1, self.width
            yield 3 * self.width, self.width
            yield self.width, self.width
            yield 1, self.width
            yield 4 * self.width, self.width
            yield self.width, 4 * self.width
        yield 1, self.width
        yield VOCABULARY, self.width

    @property
    def weight_bytes(self) -> int:
        return FLOAT_BYTES * sum(rows * columns for rows, columns in self.parts())

    @property
    def token_kv_bytes(self) -> int:
        return FLOAT_BYTES * self.layers * 2 * self.width

    def activation_bytes(self, length: int) -> int:
        """Bytes that training one sequence of `length` tokens holds when its forward pass ends."""
        # Per layer: what two norms take and give (4), queries, keys and values by head (3), what attention
        # gives (1), the hidden layer before and after its GELU (8), one on its way, and the softmax.
        per_token = self.layers * (17 * self.width + self.heads * length) + 2 * VOCABULARY
        return FLOAT_BYTES * length * per_token


@dataclass(frozen=True)
class Layer:
    """One layer's weights, as views."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    mlp_norm: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class Weights:
    """A model's weights as views of one flat tensor, so that an optimizer touches one tensor and not seventy.

    Args:
        shape: Sizes of the model.
        flat: Float32, as long as the weights together; the views share its memory.
        trained: Whether the views are leaves that gradients are wanted for.
    """

    def __init__(self, shape: Shape, flat: torch.Tensor, *, trained: bool = False) -> None:
        self.shape = shape
        self.flat = flat
        self.views = split(shape, flat)
        if trained:
            self.views = [view.detach().requires_grad_() for view in self.views]
        rest = iter(self.views)
        self.embedding = next(rest)
        self.layers = [Layer(*(next(rest) for _ in range(6))) for _ in range(shape.layers)]
        self.norm = next(rest)
        self.head = next(rest)
        self.positions = _positions(shape.context, shape.width).to(flat.device)


def split(shape: Shape, flat: torch.Tensor) -> list[torch.Tensor]:
    """Cuts a flat tensor into views of the weights' shapes."""
    views, start = [], 0
    for rows, columns in shape.parts():
        view = flat[start : start + rows * columns]
        views.append(view if rows == 1 else view.view(rows, columns))
        start += rows * columns
    return views


def initial_weights(shape: Shape, seed: int) -> torch.Tensor:
    """Draws a model's first weights: flat, float32, in CPU memory."""
    draw = torch.Generator().manual_seed(seed)
    flat = torch.empty(shape.weight_bytes // FLOAT_BYTES)
    for view in split(shape, flat):
        if view.dim() == 1:
            view.fill_(1.0)
        else:
            view.normal_(0.0, 1.0 / math.sqrt(view.shape[1]), generator=draw)
    return flat


def _positions(context: int, width: int) -> torch.Tensor:
    angles = torch.arange(context)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def forward(
    weights: Weights,
    tokens: torch.Tensor,
    attend: Attend,
    *,
    start: int = 0,
    boundary: Boundary | None = None,
) -> torch.Tensor:
    """Runs the layers.

    Args:
        weights: The model.
        tokens: Int64 of shape `(batch, tokens)`.
        attend: Attention, called once a layer.
        start: Position of the first token.
        boundary: Called with the residual stream after every layer. May raise to give the pass up.

    Returns:
        The normed residual stream, `(batch, tokens, width)`, for `logits`.
    """
    shape = weights.shape
    batch, length = tokens.shape
    x = F.embedding(tokens, weights.embedding) + weights.positions[start : start + length]
    for number, layer in enumerate(weights.layers):
        qkv = F.linear(_norm(x, layer.attention_norm), layer.qkv)
        attended = attend(number, qkv.view(batch, length, 3, shape.heads, shape.head_dim))
        x = x + F.linear(attended, layer.out)
        x = x + F.linear(F.gelu(F.linear(_norm(x, layer.mlp_norm), layer.up)), layer.down)
        if boundary is not None:
            boundary(x)
    return _norm(x, weights.norm)


def logits(weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the next token's logits, `(..., 256)`."""
    return F.linear(hidden, weights.head)


def _norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), gain)


def causal_mask(length: int, device: torch.device | str) -> torch.Tensor:
    """Returns `(1, length, length)`: zero where a token may look, minus infinity ahead of it."""
    return torch.full((1, length, length), -math.inf, device=device).triu_(1)


def attention(qkv: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Causal attention within `qkv`, `(batch, tokens, 3, heads, head_dim)`.

    Written out in matrix products: the fused kernels choose their algorithm by size and by processor, and
    some of them add in an order that changes from run to run.
    """
    batch, length, _, heads, head_dim = qkv.shape
    query, key, value = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, head_dim).unbind(0)
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=1.0 / math.sqrt(head_dim))
    mixed = torch.bmm(scores.softmax(-1), value).view(batch, heads, length, head_dim)
    return mixed.transpose(1, 2).reshape(batch, length, heads * head_dim)
