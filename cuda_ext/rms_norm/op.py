"""RMSNorm, with the residual sum in front of it where there is one."""

from typing import overload

from torch import Tensor

from cuda_ext import dispatch
from cuda_ext.rms_norm import reference


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y[..., D]."""


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(y, x + residual), both [..., D]."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """See `reference.rms_norm`. x[..., D], weight[D] -> y, or (y, x + residual)."""
    dispatch.announce("rms_norm", dispatch.REFERENCE)
    return reference.rms_norm(x, weight, eps, residual)
