"""Weights of every kind that a model may have."""

from __future__ import annotations

import torch

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def sample(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {str(dtype): (torch.rand(3, 7, generator=generator) * 100).to(dtype) for dtype in DTYPES}
    made["large"] = torch.randn(1500, 1000, generator=generator)
    made["transposed"] = made["large"][:10].t()
    made["tied"] = made["large"]
    made["scalar"] = torch.tensor(float(seed))
    made["empty"] = torch.empty(0, 5)
    return made
