"""RMSNorm in bf16 beside eager torch and torch.compile: forward, with the residual, and backward."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext.measure import Case, backward, beside_torch
from cuda_ext.rms_norm.op import rms_norm

_SIZES = [(8192, 1024), (8192, 4096), (4096, 8192), (4096, 16384)]


def cases(device: str, sizes: list[tuple[int, int]] = _SIZES) -> Iterator[Case]:
    """Rows x width. Moved: x and y; with a residual this and the sum too; backward dy, that of the sum, x and dx."""
    for rows, width in sizes:
        x, residual, dy, dtotal = (torch.randn(rows, width, device=device).bfloat16() for _ in range(4))
        weight = torch.ones(width, device=device).bfloat16()
        size, one = f"{rows} x {width}", x.numel() * x.element_size()
        yield beside_torch(f"forward {size}", _ours, _torch, (x, weight), 2 * one)
        yield beside_torch(f"with residual {size}", _ours, _torch, (x, weight, residual), 4 * one)
        yield backward(f"backward {size}", _ours, _torch, (x, weight, residual), (dy, dtotal), 4 * one)


def _ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return rms_norm(x, weight, 1e-5) if residual is None else rms_norm(x, weight, 1e-5, residual)


def _torch(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    y = F.rms_norm(total, weight.shape, weight, 1e-5)
    return y if residual is None else (y, total)
