"""SwiGLU in bf16 beside eager torch, torch.compile and, where it is installed, Liger: forward and backward."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext.measure import Case, backward, beside_torch, rival
from cuda_ext.swiglu.op import swiglu

_SIZES = [(8192, 4096), (8192, 14336), (2048, 28672)]


def cases(device: str, sizes: list[tuple[int, int]] = _SIZES) -> Iterator[Case]:
    """Rows x width. Moved: gate, up and y; backward dy, gate, up and two gradients."""
    for rows, width in sizes:
        gate, up, dy = (torch.randn(rows, width, device=device).bfloat16() for _ in range(3))
        size, one = f"{rows} x {width}", gate.numel() * gate.element_size()
        liger = rival("liger", "liger_kernel.transformers.functional", lambda module: module.liger_swiglu)
        yield beside_torch(f"forward {size}", swiglu, _torch, (gate, up), 3 * one, others=liger)
        yield backward(f"backward {size}", swiglu, _torch, (gate, up), (dy,), 5 * one, others=liger)


def _torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
