"""LayerNorm with a residual in bf16 beside eager torch and torch.compile, and where they are installed Liger and NVIDIA
apex: forward and backward."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext import apex
from cuda_ext.layer_norm.op import layer_norm
from cuda_ext.measure import Case, Rivals, backward, beside_torch, rival

_SIZES = [(8192, 1024), (8192, 4096), (4096, 16384)]


def cases(device: str, sizes: list[tuple[int, int]] = _SIZES) -> Iterator[Case]:
    """Rows x width. Moved: x, the residual, their sum and y; backward dy, that of the sum, the sum and dx."""
    for rows, width in sizes:
        x, residual, dy, dtotal = (torch.randn(rows, width, device=device).bfloat16() for _ in range(4))
        weight, bias = (torch.full((width,), value, device=device).bfloat16() for value in (1.0, 0.0))
        size, moved, inputs = f"{rows} x {width}", 4 * x.numel() * x.element_size(), (x, weight, bias, residual)
        yield beside_torch(f"with residual {size}", _ours, _torch, inputs, moved, others=_rivals())
        yield backward(f"backward {size}", _ours, _torch, inputs, (dy, dtotal), moved, others=_rivals())


def _rivals() -> Rivals:
    liger = rival("liger", "liger_kernel.transformers.functional", lambda module: _summed(module.liger_layer_norm))
    return liger if apex.why_not("norm") else {**liger, "apex": _summed(apex.layer_norm)}


def _summed(norm: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, weight, bias, 1e-5), total

    return call


def _ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return layer_norm(x, weight, bias, 1e-5, residual)


def _torch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, 1e-5), total
