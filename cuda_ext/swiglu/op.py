"""SwiGLU of two projections."""

from typing import Any

import torch
from torch import Tensor

from cuda_ext import dispatch, library
from cuda_ext.swiglu import reference


def swiglu(gate: Tensor, up: Tensor, *, strict: bool = False) -> Tensor:
    """See `reference.swiglu`. gate and up[..., F] -> [..., F]; strict: an element's bits depend on it alone."""
    if dispatch.choose("swiglu", gate, up).kernel:
        y: Tensor = fused(gate, up)  # strict by itself
        return y
    if strict:
        dispatch.announce("swiglu", dispatch.STRICT)
        return reference.strict_swiglu(gate, up)
    return reference.swiglu(gate, up)


@torch.library.custom_op("cuda_ext::swiglu", mutates_args=())
def fused(gate: Tensor, up: Tensor) -> Tensor:
    """The kernel: y[..., F]."""
    y = _like(gate, up)
    library.operators(gate).swiglu_forward(gate.contiguous(), up.contiguous(), y)
    return y


@torch.library.custom_op("cuda_ext::swiglu_backward", mutates_args=())
def fused_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    dgate, dup = _like_inputs(dy, gate, up)
    library.operators(gate).swiglu_backward(dy.contiguous(), gate.contiguous(), up.contiguous(), dgate, dup)
    return dgate, dup


@fused.register_fake
def _like(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@fused_backward.register_fake
def _like_inputs(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _like(gate, up), _like(up, gate)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = fused_backward(dy, *ctx.saved_tensors)
    return dgate, dup


fused.register_autograd(_backward, setup_context=_keep)
