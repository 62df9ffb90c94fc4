"""Greedy decoding: with a paged cache, and without any for the check."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

import torch_elastic_mem as tem
from torch_elastic_mem.demo.model import Attend, Weights, attention, causal_mask, forward, logits


class PagedDecoder:
    """Decodes one request at a time, so that a token never depends on what else is being served.

    Calls come from one thread. The caller owns the blocks: they are resident and numerous enough.

    Args:
        weights: The model.
        kv: Blocks of shape `(layers, 2, block_tokens, heads, head_dim)`.
        block_tokens: Tokens of one block.
    """

    def __init__(self, weights: Weights, kv: tem.ElasticKVTensor, block_tokens: int) -> None:
        self._weights = weights
        self._layers = [kv.layer(number) for number in range(weights.shape.layers)]
        self._block_tokens = block_tokens
        self._device = weights.flat.device

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int], blocks: Sequence[int]) -> int:
        """Fills the blocks with the prompt's keys and values, and returns the first token of the answer."""
        length = len(prompt)
        mask = causal_mask(length, self._device)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            # By slices: a scatter by index may first copy all that it writes into, and most of the cache has
            # no memory behind it.
            stored, size = self._layers[layer], self._block_tokens
            for begin, end in runs(blocks[: length // size]):
                part = qkv[0, begin * size : end * size, 1:].unflatten(0, (end - begin, size)).transpose(1, 2)
                stored[blocks[begin] : blocks[begin] + end - begin].copy_(part)
            if rest := length % size:
                stored[blocks[length // size], :, :rest].copy_(qkv[0, length - rest :, 1:].transpose(0, 1))
            return attention(qkv, mask)

        return self._greedy(prompt, attend, 0)

    @torch.inference_mode()
    def step(self, token: int, position: int, blocks: Sequence[int]) -> int:
        """Appends one token at `position` to the cache, and returns the token after it."""
        block, slot = blocks[position // self._block_tokens], position % self._block_tokens
        index = torch.tensor(blocks[: position // self._block_tokens + 1], device=self._device)
        scale = 1.0 / math.sqrt(self._weights.shape.head_dim)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            stored = self._layers[layer]
            stored[block, :, slot].copy_(qkv[0, 0, 1:])
            # Gathered whole, a block's two halves would have to be copied once more to stand apart.
            halves = (stored[:, half].index_select(0, index) for half in (0, 1))
            keys, values = (half.flatten(0, 1)[: position + 1] for half in halves)
            scores = torch.bmm(qkv[0, :, 0].transpose(0, 1), keys.permute(1, 2, 0)) * scale
            return torch.bmm(scores.softmax(-1), values.transpose(0, 1)).view(1, 1, -1)

        return self._greedy([token], attend, position)

    def _greedy(self, tokens: Sequence[int], attend: Attend, start: int) -> int:
        hidden = forward(self._weights, torch.tensor([tokens], device=self._device), attend, start=start)
        return int(logits(self._weights, hidden[0, -1:]).argmax())


def runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """The positions (begin, end) of neighbouring blocks that stand one after the other."""
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1] + 1]
    return list(zip(starts, [*starts[1:], len(blocks)], strict=True)) if starts else []


@torch.inference_mode()
def next_logits(weights: Weights, tokens: Sequence[int]) -> torch.Tensor:
    """Runs all of `tokens` through the model, with no cache; returns the next token's logits, `(256,)`."""
    device = weights.flat.device
    mask = causal_mask(len(tokens), device)
    batch = torch.tensor([list(tokens)], device=device)
    hidden = forward(weights, batch, lambda _, qkv: attention(qkv, mask))
    return logits(weights, hidden[0, -1:])[0]
