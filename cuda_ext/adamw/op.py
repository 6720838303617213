"""The AdamW update of many tensors at once, in place, and the norm of many tensors that it can be clipped by."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cuda_ext import apex, dispatch, library
from cuda_ext.adamw import reference
from cuda_ext.adamw.reference import Factors

_STRETCH = 1 << 17  # elements that a CPU's cache holds with their states and all that comes between
CHUNK, MOST_PARTS = 4096, 1024  # as in kernel.cu: elements a partial sum of a norm, and partial sums a tensor at most
_FORM = dispatch.Implementation(
    "reference", "kernels take contiguous float32 parameters and states, gradients of one dtype, bfloat16 copies"
)


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unscale: float = 1.0,
    clip: Tensor | None = None,
    non_finite: Tensor | None = None,
    copies: list[Tensor] | None = None,
) -> None:
    """See `reference.adamw`: four lists (`copies` a fifth) of equal length, tensor i of each with one shape; writes all
    but `grads`. The kernel reads `clip` and `non_finite` (fp32) on the device and waits for neither; so a skipped
    step counts in `step`, unless the caller looks."""
    if not params:
        return
    settings: dict[str, Any] = {
        "step": step, "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay,
        "unscale": unscale, "clip": clip, "non_finite": non_finite,
    }  # fmt: skip
    chosen = dispatch.choose("adamw", *params, *grads)
    fits = chosen.fused and _fits(params, grads, [*exp_avgs, *exp_avg_sqs], copies or [])
    if fits and chosen is apex.RUNS["optimizer"]:
        apex.adamw(params, grads, exp_avgs, exp_avg_sqs, **settings, copies=copies)
        return
    if fits:
        factors = [*Factors.of(step, lr, beta1, beta2, eps, weight_decay), unscale]
        fused(params, grads, exp_avgs, exp_avg_sqs, copies or [], factors, clip, non_finite)
        return
    if chosen.fused:
        dispatch.announce("adamw", _FORM)
    for piece in _pieces(params, grads, exp_avgs, exp_avg_sqs, *([copies] if copies else [])):
        reference.adamw(*piece[:4], **settings, copies=piece[4] if copies else None)


def multi_tensor_norm(tensors: list[Tensor], unscale: float = 1.0) -> tuple[Tensor, Tensor]:
    """See `reference.multi_tensor_norm`: (norm, non_finite), of no dimension. The kernel adds partial sums whose number
    and order the tensors' sizes settle, so that the bits depend on no card."""
    if not tensors or not dispatch.choose("multi_tensor_norm", *tensors).kernel:
        return reference.multi_tensor_norm(tensors, unscale)
    norm, non_finite = fused_norm(tensors, unscale)
    return norm, non_finite


def parts(tensors: list[Tensor]) -> int:
    """How many partial sums the kernel makes of these."""
    return sum(min(-(-tensor.numel() // CHUNK), MOST_PARTS) for tensor in tensors)


@torch.library.custom_op("cuda_ext::adamw", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies"))
def fused(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    factors: list[float],
    clip: Tensor | None,
    non_finite: Tensor | None,
) -> None:
    """The kernel. `factors` are `reference.Factors` and unscale; `copies` may be []."""
    lists = (params, [grad.contiguous() for grad in grads], exp_avgs, exp_avg_sqs, copies)
    library.operators(params[0]).adamw_update(*lists, *factors, clip, non_finite)


@torch.library.custom_op("cuda_ext::multi_tensor_norm", mutates_args=())
def fused_norm(tensors: list[Tensor], unscale: float) -> tuple[Tensor, Tensor]:
    """The kernel: (norm, non_finite)."""
    norm, non_finite = _like_norm(tensors, unscale)
    sums = tensors[0].new_empty(parts(tensors), dtype=torch.float32)
    library.operators(sums).adamw_norm([x.contiguous() for x in tensors], unscale, sums, norm, non_finite)
    return norm, non_finite


@fused.register_fake
def _like_nothing(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    factors: list[float],
    clip: Tensor | None,
    non_finite: Tensor | None,
) -> None:
    return None


@fused_norm.register_fake
def _like_norm(tensors: list[Tensor], unscale: float) -> tuple[Tensor, Tensor]:
    norm, non_finite = (tensors[0].new_empty((), dtype=torch.float32) for _ in range(2))
    return norm, non_finite


def _fits(params: list[Tensor], grads: list[Tensor], states: list[Tensor], copies: list[Tensor]) -> bool:
    written = [*params, *states, *copies]
    return (
        all(tensor.dtype == torch.float32 for tensor in (*params, *states))
        and all(tensor.is_contiguous() for tensor in written)
        and all(grad.dtype == grads[0].dtype for grad in grads)
        and all(copy.dtype == torch.bfloat16 for copy in copies)
    )


def _pieces(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """All at once; on a CPU stretch by stretch, so that the dozen passes of the definition stay in its cache."""
    if not lists[0] or lists[0][0].device.type != "cpu":
        yield lists
        return
    for tensors in zip(*lists, strict=True):
        flat = all(tensor.is_contiguous() for tensor in tensors)
        yield from zip(*(_stretches(tensor) if flat else [[tensor]] for tensor in tensors), strict=True)


def _stretches(tensor: Tensor) -> list[list[Tensor]]:
    return [[stretch] for stretch in tensor.view(-1).split(_STRETCH)]
