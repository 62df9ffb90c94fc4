"""Training: Adam over micro-batches. Each of its moves is done wholly or not at all; it knows no accounts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from torch_elastic_mem.demo.model import Weights, attention, causal_mask, forward, logits, split
from torch_elastic_mem.demo.scale import Scale
from torch_elastic_mem.demo.text import Text

_RATE, _BETA1, _BETA2, _EPSILON = 1e-3, 0.9, 0.99, 1e-8


def _forget_backward() -> None:
    """Frees what a failed backward pass left in the queue that autograd has for the thread.

    The tasks that were ready stay there, each with the graph and the activations below it, until the next
    backward pass comes upon them: this one is of nothing. The threads of a GPU pass over theirs at once.
    """
    nothing = torch.empty(0, requires_grad=True)
    torch.autograd.grad(nothing, nothing, torch.empty_like(nothing))


class Trainer:
    """Trains one model. All calls come from one thread.

    `micro_batch` and `update` either finish or raise with weights, sums and moments as they were, so whoever
    drives them may call again after an interruption or an out-of-memory error, and gets the same bits.

    Args:
        scale: Sizes.
        initial: The first weights, flat, in CPU memory.
        text: What is learnt.
        device: A torch device.
        boundary: Called between layers, on the way forth and on the way back; what it raises comes out of
            `micro_batch`.
        cold: Where moments go when spilled: float32 of shape `(2, weights)` in CPU memory, not the arena's.
    """

    def __init__(
        self,
        scale: Scale,
        initial: torch.Tensor,
        text: Text,
        device: str,
        *,
        boundary: Callable[[], None] | None = None,
        cold: torch.Tensor | None = None,
    ) -> None:
        self._scale = scale
        self._text = text
        self._device = device
        self._boundary = boundary
        self._weights = Weights(scale.shape, initial.to(device, copy=True), trained=True)
        self._sums = torch.zeros_like(self._weights.flat)
        self._sum_views = split(scale.shape, self._sums)
        self._moments: torch.Tensor | None = torch.zeros(2, initial.numel(), device=device)
        self._cold = cold
        self._mask = causal_mask(scale.length, device)
        self._steps = 0

    def micro_batch(self, number: int) -> float:
        """Adds the gradients of this step's micro-batch `number` to the sums, and returns its loss."""
        seed = self._steps * self._scale.micro_batches + number
        inputs, targets = self._text.batch(seed, self._scale.sequences, self._scale.length)
        hidden = forward(
            self._weights,
            inputs.to(self._device),
            lambda _, qkv: attention(qkv, self._mask),
            boundary=None if self._boundary is None else self._between_layers,
        )
        predicted = logits(self._weights, hidden).flatten(0, 1)
        loss = F.cross_entropy(predicted, targets.to(self._device).flatten())
        try:
            gradients = torch.autograd.grad(loss, self._weights.views)
        except BaseException:
            _forget_backward()
            raise
        value = loss.item()
        torch._foreach_add_(self._sum_views, gradients)
        return value

    def _between_layers(self, x: torch.Tensor) -> None:
        boundary = self._boundary
        assert boundary is not None
        boundary()
        x.register_hook(lambda _: boundary())

    def update(self) -> None:
        """Ends the step: one Adam update by the summed gradients, and empty sums."""
        # Whatever can fail for want of memory comes before the first change.
        moments = self._restored_moments()
        scratch = torch.empty_like(self._weights.flat)
        steps = self._steps + 1
        mean, square = moments
        gradient = self._sums.div_(self._scale.micro_batches)
        mean.mul_(_BETA1).add_(gradient, alpha=1 - _BETA1)
        square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        torch.mul(square, 1 / (1 - _BETA2**steps), out=scratch).sqrt_().add_(_EPSILON)
        self._weights.flat.addcdiv_(mean, scratch, value=-_RATE / (1 - _BETA1**steps))
        self._sums.zero_()
        self._steps = steps

    def spill(self) -> int:
        """Moves the moments out of the arena until the next `update`; returns the bytes that went."""
        if self._moments is None or self._cold is None:
            return 0
        spilled = self._moments.nbytes
        self._cold.copy_(self._moments)
        self._moments = None
        return spilled

    def _restored_moments(self) -> torch.Tensor:
        if self._moments is None:
            assert self._cold is not None
            self._moments = self._cold.to(self._device, copy=True)
        return self._moments

    @property
    def steps(self) -> int:
        """Steps completed."""
        return self._steps


def train(trainer: Trainer, micro_batches: int) -> float:
    """One whole step without interruptions; returns the mean of its losses."""
    loss = sum(trainer.micro_batch(number) for number in range(micro_batches))
    trainer.update()
    return loss / micro_batches
