"""Rows to experts and back in bf16, beside eager torch and torch.compile: both directions."""

from collections.abc import Iterator

import torch

from cuda_ext.measure import Case, backward, beside_torch
from cuda_ext.moe import op, reference

_SIZES = [(8192, 2, 4096), (8192, 8, 2048)]


def cases(device: str, sizes: list[tuple[int, int, int]] = _SIZES) -> Iterator[Case]:
    """Tokens, experts a token, width; as many rows as copies."""
    for tokens, k, width in sizes:
        rows = torch.randperm(tokens * k, device=device).view(tokens, k)
        x = torch.randn(tokens, width, device=device).bfloat16()
        y = torch.randn(tokens * k, width, device=device).bfloat16()
        weights = torch.rand(tokens, k, device=device).bfloat16()
        size, one = f"{tokens} x {k}, {width} wide", 2 * width * tokens
        yield beside_torch(f"permute {size}", op.permute, reference.permute, (x, rows, tokens * k), (1 + k) * one)
        yield beside_torch(f"unpermute {size}", op.unpermute, reference.unpermute, (y, rows, weights), (1 + k) * one)
        yield backward(
            f"unpermute's backward {size}",
            lambda y, weights, rows=rows: op.unpermute(y, rows, weights),
            lambda y, weights, rows=rows: reference.unpermute(y, rows, weights),
            (y, weights),
            (x,),
            (2 + 2 * k) * one,
        )
