"""Rows to experts and back."""

from typing import Any

import torch
from torch import Tensor

from cuda_ext import dispatch, library
from cuda_ext.moe import reference


def permute(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """See `reference.permute`. x[N,D], rows[N,k] -> [size,D]."""
    if not dispatch.choose("moe", x).kernel:
        return reference.permute(x, rows, size)
    y: Tensor = fused_permute(x, rows, size)
    return y


def unpermute(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """See `reference.unpermute`. y[S,D], rows and weights[N,k] -> [N,D]."""
    if not dispatch.choose("moe", y, weights).kernel:
        return reference.unpermute(y, rows, weights)
    out: Tensor = fused_unpermute(y, rows, weights)
    return out


@torch.library.custom_op("cuda_ext::moe_permute", mutates_args=())
def fused_permute(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """The kernel."""
    y = _permuted(x, rows, size)
    library.operators(x).moe_gather(x.contiguous(), _slots(rows, size), None, rows.shape[1], y)
    return y


@torch.library.custom_op("cuda_ext::moe_unpermute", mutates_args=())
def fused_unpermute(y: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """The kernel; without weights the plain sum, which is the gradient of `permute`."""
    out = _unpermuted(y, rows, weights)
    heavy = None if weights is None else weights.float().contiguous()
    library.operators(y).moe_combine(y.contiguous(), rows.contiguous(), heavy, out)
    return out


@torch.library.custom_op("cuda_ext::moe_unpermute_backward", mutates_args=())
def fused_unpermute_backward(dout: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and weights."""
    dy, dweights = _like_inputs(dout, y, rows, weights)
    heavy, dout, rows = weights.float().contiguous(), dout.contiguous(), rows.contiguous()
    of_weights = torch.empty_like(heavy)
    library.operators(y).moe_gather(dout, _slots(rows, len(y)), heavy, rows.shape[1], dy)
    library.operators(y).moe_dot(dout, y.contiguous(), rows, of_weights)
    return dy, dweights.copy_(of_weights)


def _slots(rows: Tensor, size: int) -> Tensor:
    """[size]: which copy of which token stands in a row, n * k + j; -1 where none does."""
    numbers = torch.arange(rows.numel(), device=rows.device)
    return torch.full((size,), -1, dtype=torch.int64, device=rows.device).scatter_(0, rows.flatten(), numbers)


@fused_permute.register_fake
def _permuted(x: Tensor, rows: Tensor, size: int) -> Tensor:
    return x.new_empty(size, x.shape[-1])


@fused_unpermute.register_fake
def _unpermuted(y: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    return y.new_empty(rows.shape[0], y.shape[-1])


@fused_unpermute_backward.register_fake
def _like_inputs(dout: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _permute_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return fused_unpermute(dy, *ctx.saved_tensors, None), None, None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, Tensor]:
    dy, dweights = fused_unpermute_backward(dout, *ctx.saved_tensors)
    return dy, None, dweights


fused_permute.register_autograd(_permute_backward, setup_context=_keep_rows)
fused_unpermute.register_autograd(_unpermute_backward, setup_context=_keep)
