"""RMSNorm, with the residual sum in front of it where there is one."""

from typing import Any, overload

import torch
from torch import Tensor

from cuda_ext import apex, dispatch, library
from cuda_ext.rms_norm import reference

LINES = 264  # blocks of the backward kernel, two for each of an H100's multiprocessors: the same bits on every card


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y[..., D]."""


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(y, x + residual), both [..., D]."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """See `reference.rms_norm`. x[..., D], weight[D] -> y, or (y, x + residual)."""
    chosen = dispatch.choose("rms_norm", x, weight)
    if chosen is apex.RUNS["norm"]:
        total = x if residual is None else x + residual
        return _apex(total, weight, eps) if residual is None else (_apex(total, weight, eps), total)
    if not chosen.kernel:
        return reference.rms_norm(x, weight, eps, residual)
    if residual is None:
        y: Tensor = fused(x, weight, eps)[0]
        return y
    y, total, _ = fused_with_residual(x, residual, weight, eps)
    return y, total


_apex = torch.compiler.disable(apex.rms_norm, reason="older versions of apex cannot be traced")


@torch.library.custom_op("cuda_ext::rms_norm", mutates_args=())
def fused(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The kernel: (y[..., D], 1 / rms [...])."""
    y, inverse = _like(x, weight, eps)
    library.operators(x).rms_norm_forward(x.contiguous(), None, weight.contiguous(), eps, y, None, inverse)
    return y, inverse


@torch.library.custom_op("cuda_ext::rms_norm_with_residual", mutates_args=())
def fused_with_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel: (y, x + residual, 1 / rms)."""
    y, total, inverse = _like_with_residual(x, residual, weight, eps)
    inputs = (x.contiguous(), residual.contiguous(), weight.contiguous())
    library.operators(x).rms_norm_forward(*inputs, eps, y, total, inverse)
    return y, total, inverse


@torch.library.custom_op("cuda_ext::rms_norm_backward", mutates_args=())
def fused_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x (and of a residual, the same) and of weight."""
    dx, dweight = _like_inputs(dy, dtotal, total, weight, inverse)
    partial = total.new_empty(min(LINES, inverse.numel()), len(weight), dtype=torch.float32)
    further = None if dtotal is None else dtotal.contiguous()
    inputs = (dy.contiguous(), further, total.contiguous(), weight.contiguous(), inverse)
    library.operators(total).rms_norm_backward(*inputs, dx, dweight, partial)
    return dx, dweight


@fused.register_fake
def _like(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


@fused_with_residual.register_fake
def _like_with_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, inverse = _like(x, weight, eps)
    return y, torch.empty_like(y), inverse


@fused_backward.register_fake
def _like_inputs(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(total, memory_format=torch.contiguous_format), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*fused_backward(dy, None, *ctx.saved_tensors), None)


def _backward_with_residual(ctx: Any, dy: Tensor, dtotal: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dx, dweight = fused_backward(dy, dtotal, *ctx.saved_tensors)
    return dx, dx, dweight, None


fused.register_autograd(_backward, setup_context=_keep)
fused_with_residual.register_autograd(_backward_with_residual, setup_context=_keep_total)
for _op in (fused, fused_with_residual):
    _op.register_autocast("cuda", torch.float32)  # as torch does with its norms
