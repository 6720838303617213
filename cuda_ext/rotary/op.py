"""Rotary position embedding of queries or keys."""

from torch import Tensor

from cuda_ext import dispatch
from cuda_ext.rotary import reference


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotary`. x[B,T,N,H], cos and sin[B|1,T,H] -> [B,T,N,H]."""
    dispatch.announce("rotary", dispatch.REFERENCE)
    return reference.rotary(x, cos, sin)
