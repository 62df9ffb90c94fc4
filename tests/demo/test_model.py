"""The model, its training and its decoding, without an arena where none is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import torch_elastic_mem as tem
from torch_elastic_mem.demo.decoder import PagedDecoder, next_logits
from torch_elastic_mem.demo.model import Weights, attention, causal_mask, forward, initial_weights, logits
from torch_elastic_mem.demo.scale import Scale, scale_for
from torch_elastic_mem.demo.stage import Stage
from torch_elastic_mem.demo.text import Text
from torch_elastic_mem.demo.trainer import Trainer, train


class Interrupted(Exception):
    """Raised by a test in the middle of a move."""


class FailingAt(TorchDispatchMode):
    """Raises at one of the operations that run in it, on the way forth or back."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.left -= 1
        if self.left == -1:
            raise Interrupted
        return func(*args, **(kwargs or {}))


def saved_bytes(scale: Scale, text: Text) -> int:
    """Bytes that autograd keeps of one sequence, weights apart."""
    weights = Weights(scale.shape, initial_weights(scale.shape, 0), trained=True)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mask = causal_mask(scale.length, "cpu")
    inputs, targets = text.batch(0, 1, scale.length)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = forward(weights, inputs, lambda _, qkv: attention(qkv, mask))
        loss = F.cross_entropy(logits(weights, hidden).flatten(0, 1), targets.flatten())
    del saved[weights.flat.untyped_storage().data_ptr()]
    assert loss.isfinite()
    return sum(saved.values())


def test_reckoned_activations_are_those_that_autograd_keeps(text: Text) -> None:
    scale = scale_for("host", 192 << 20)
    reckoned = scale.shape.activation_bytes(scale.length)
    assert 0.75 < saved_bytes(scale, text) / reckoned < 1.1


def test_a_token_sees_nothing_ahead_of_it(scale: Scale, text: Text, initial: torch.Tensor) -> None:
    weights = Weights(scale.shape, initial)
    mask = causal_mask(20, "cpu")
    tokens, _ = text.batch(0, 1, 20)
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 256
    before, after = (
        forward(weights, batch, lambda _, qkv: attention(qkv, mask)) for batch in (tokens, changed)
    )
    assert before[0, :12].equal(after[0, :12])
    assert not before[0, 12:].allclose(after[0, 12:])


def test_training_learns(scale: Scale, text: Text, initial: torch.Tensor) -> None:
    trainer = Trainer(scale, initial, text, "cpu")
    losses = [train(trainer, scale.micro_batches) for _ in range(30)]
    assert losses[-1] < losses[0] - 1
    assert trainer.steps == 30


def test_a_micro_batch_interrupted_anywhere_changes_nothing(
    scale: Scale, text: Text, initial: torch.Tensor
) -> None:
    alone = Trainer(scale, initial, text, "cpu")
    expected = [train(alone, scale.micro_batches) for _ in range(3)]
    fuse = -1

    def boundary() -> None:
        nonlocal fuse
        fuse -= 1
        if fuse == 0:
            raise Interrupted

    trainer = Trainer(scale, initial, text, "cpu", boundary=boundary)
    points = 0
    while True:
        fuse = points + 1
        try:
            trainer.micro_batch(0)
        except Interrupted:
            points += 1
        else:
            break
    # Once a layer on the way forth, once on the way back.
    assert points == 2 * scale.shape.layers
    fuse = -1
    losses = [trainer.micro_batch(1)]
    trainer.update()
    losses = [train(trainer, scale.micro_batches) for _ in range(2)]
    assert losses == expected[1:]


def test_spilled_moments_come_back_bit_for_bit(scale: Scale, text: Text, initial: torch.Tensor) -> None:
    alone = Trainer(scale, initial, text, "cpu")
    expected = [train(alone, scale.micro_batches) for _ in range(4)]
    cold = torch.empty(2, initial.numel())
    trainer = Trainer(scale, initial, text, "cpu", cold=cold)
    losses = []
    for _ in range(4):
        losses.append(train(trainer, scale.micro_batches))
        assert trainer.spill() == cold.nbytes
        assert trainer.spill() == 0
    assert losses == expected


def test_an_update_that_finds_no_memory_changes_nothing(
    scale: Scale, text: Text, initial: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Trainer(scale, initial, text, "cpu")
    expected = [train(alone, scale.micro_batches) for _ in range(2)]
    trainer = Trainer(scale, initial, text, "cpu")
    loss = sum(trainer.micro_batch(number) for number in range(scale.micro_batches))

    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise tem.OutOfMemory("no")

    with monkeypatch.context() as patch, pytest.raises(tem.OutOfMemory):
        patch.setattr(torch, "empty_like", refuse)
        trainer.update()
    trainer.update()
    assert [loss / scale.micro_batches, train(trainer, scale.micro_batches)] == expected


def decode(served: Stage, weights: Weights, prompt: list[int], blocks: list[int], count: int) -> list[int]:
    """Decodes out of a cache of its own, in the given blocks."""
    shape = served.scale.shape
    block_shape = (2, served.scale.block_tokens, shape.heads, shape.head_dim)
    kv = tem.ElasticKVTensor(served.account, 64, block_shape, torch.float32, layers=shape.layers)
    kv.ensure(blocks)
    decoder = PagedDecoder(weights, kv, served.scale.block_tokens)
    tokens = [decoder.prefill(prompt, blocks[: -(-len(prompt) // served.scale.block_tokens)])]
    for position in range(len(prompt), len(prompt) + count - 1):
        tokens.append(decoder.step(tokens[-1], position, blocks))
    kv.release(blocks)
    return tokens


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_a_paged_cache_decodes_as_none_does_wherever_its_blocks_are(
    served: Stage, text: Text, initial: torch.Tensor, length: int
) -> None:
    weights = Weights(served.scale.shape, initial)
    prompt, count = text.prompt(length, length), 20
    blocks = -(-(length + count) // served.scale.block_tokens)
    tokens = decode(served, weights, prompt, list(range(blocks)), count)
    assert tokens == decode(served, weights, prompt, list(range(60, 60 - 7 * blocks, -7)), count)
    for known, token in enumerate(tokens):
        assert int(next_logits(weights, prompt + tokens[:known]).argmax()) == token


def test_a_micro_batch_that_failed_anywhere_has_left_nothing_behind(trained: Stage) -> None:
    with trained.account.allocations():
        trainer = trained.trainer()
        counting = FailingAt(-1)
        with counting:
            expected = trainer.micro_batch(0)
        before = trained.used()
        for number in range(-1 - counting.left):
            with pytest.raises(Interrupted), FailingAt(number):
                trainer.micro_batch(0)
            assert trained.used() == before, number
        assert trainer.micro_batch(0) == expected
        del trainer
