"""SwiGLU of two projections."""

from torch import Tensor

from cuda_ext import dispatch
from cuda_ext.swiglu import reference


def swiglu(gate: Tensor, up: Tensor, *, strict: bool = False) -> Tensor:
    """See `reference.swiglu`. gate and up[..., F] -> [..., F]; strict: an element's bits depend on it alone."""
    dispatch.announce("swiglu", dispatch.STRICT if strict else dispatch.REFERENCE)
    return reference.strict_swiglu(gate, up) if strict else reference.swiglu(gate, up)
