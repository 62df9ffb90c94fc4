"""How large a model, a micro-batch and a burst suit a capacity.

The demo means something only where the two tenants do not fit side by side at a burst, and do fit once
training has yielded. Both follow from the capacity here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_elastic_mem.demo.model import Shape
from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.units import format_bytes

_HOST = Shape(layers=6, width=128, heads=4, context=512)
_CUDA = Shape(layers=8, width=768, heads=12, context=1024)
# Below the first a micro-batch of one sequence fills the arena; above the second one burst outlasts the demo.
_HOST_RANGE = (128 << 20, 512 << 20)
_CUDA_RANGE = (2 << 30, 64 << 30)

_TRAINING_SHARE = 0.7  # of the capacity, when a forward pass ends
_BURST_REACH = 0.45  # of the way from what is free beside training to what is free once it stands still


@dataclass(frozen=True)
class Scale:
    """What the demo runs with.

    Attributes:
        capacity: Bytes of the arena.
        shape: The model, the same for both tenants.
        sequences: Sequences of one micro-batch.
        length: Tokens of one training sequence.
        micro_batches: Micro-batches of one step.
        block_tokens: Tokens of one KV block.
        prompt_tokens: Shortest and longest prompt of a burst.
        burst_requests: Requests of one burst.
        tokens_per_second: Decoded tokens that the schedule reckons with.
    """

    capacity: int
    shape: Shape
    sequences: int
    length: int
    micro_batches: int
    block_tokens: int
    prompt_tokens: tuple[int, int]
    burst_requests: int
    tokens_per_second: int

    @property
    def training_peak(self) -> int:
        """Bytes that training holds when a forward pass ends."""
        # Weights, sums of gradients, two moments; and the activations.
        return 4 * self.shape.weight_bytes + self.sequences * self.shape.activation_bytes(self.length)

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.shape.token_kv_bytes

    @property
    def burst_bytes(self) -> int:
        """Bytes of KV when all of a burst's prompts are in."""
        return self.burst_requests * sum(self.prompt_tokens) // 2 * self.shape.token_kv_bytes


def default_capacity(backend: str, free: int) -> int:
    """Returns the capacity where none was asked for; `free` is what the device has."""
    return 192 << 20 if backend == "host" else min(6 << 30, free * 6 // 10)


def scale_for(backend: str, capacity: int) -> Scale:
    """Chooses the sizes for a capacity in bytes.

    Raises:
        InvalidArgument: The capacity is outside the range in which the demo shows a yield.
    """
    host = backend == "host"
    least, most = _HOST_RANGE if host else _CUDA_RANGE
    if not least <= capacity <= most:
        raise InvalidArgument(
            f"a demo of {format_bytes(capacity)} was asked for: on the {backend} backend its model and its "
            f"bursts suit {format_bytes(least)} to {format_bytes(most)}; pass a --capacity between them"
        )
    shape = _HOST if host else _CUDA
    length = 128 if host else 256
    weights = shape.weight_bytes
    sequences = int((_TRAINING_SHARE * capacity - 4 * weights) // shape.activation_bytes(length))
    prompts = (shape.context * 5 // 8, shape.context * 7 // 8)
    peak = 4 * weights + sequences * shape.activation_bytes(length)
    beside = capacity - weights - peak
    alone = capacity - weights - 2 * weights
    burst = beside + _BURST_REACH * (alone - beside)
    return Scale(
        capacity=capacity,
        shape=shape,
        sequences=sequences,
        length=length,
        micro_batches=2,
        block_tokens=16,
        prompt_tokens=prompts,
        burst_requests=int(burst // (sum(prompts) // 2 * shape.token_kv_bytes)),
        tokens_per_second=250,
    )
