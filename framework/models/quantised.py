"""Frozen matrices in 4 bits (QLoRA, Dettmers et al. 2023): NormalFloat numbers of blocks of 64, the blocks' scales
quantised once more; by bitsandbytes, which is an extra.

What is held takes 4.13 bits a weight. A product makes the matrix anew for the time of its forward, and once more for
that of its backward, so that no copy waits in between. Left out: kernels that multiply without it, and matrices that
ranks cut or share out (each rank holds all of them).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.core.errors import UsageError

_BLOCK = 64  # weights that share a scale, as in the paper


def library() -> Any:
    """bitsandbytes' functions; UsageError where it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError:
        raise UsageError(
            'lora.base=nf4 needs bitsandbytes: pip install "framework[quantised]"; or leave lora.base out'
        ) from None
    return functional


class Quantised(nn.Module):
    """A matrix [O,I] in 4 bits. It holds nothing until `take`."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape
        self._codes: Tensor | None = None
        self._scales: Any = None

    def take(self, weight: Tensor) -> None:
        """Hold what is nearest to weight[O,I]."""
        self._codes, self._scales = library().quantize_4bit(
            weight.float(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[O,I] in `dtype`, made anew."""
        assert self._codes is not None, "nothing was taken yet"
        found: Tensor = library().dequantize_4bit(self._codes, self._scales)
        return found.to(dtype)

    @property
    def bytes(self) -> int:
        """Held of it."""
        state = self._scales
        assert self._codes is not None
        nested = state.state2.absmax if state.nested else state.absmax[:0]
        return self._codes.nbytes + state.absmax.nbytes + nested.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """x[..., I] -> x W^T [..., O]."""
        y: Tensor = _Product.apply(x, self)
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Quantised) -> Tensor:
        ctx.matrix = matrix
        return F.linear(x, matrix.weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.matrix.weight(gradient.dtype), None
