"""The AdamW update of many tensors at once, in place."""

from collections.abc import Iterator

from torch import Tensor

from cuda_ext import dispatch
from cuda_ext.adamw import reference

_STRETCH = 1 << 17  # elements that a CPU's cache holds with their states and all that comes between


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
) -> None:
    """See `reference.adamw`: four lists of equal length, tensor i of each with one shape; writes all but `grads`."""
    dispatch.announce("adamw", dispatch.REFERENCE)
    for piece in _pieces(params, grads, exp_avgs, exp_avg_sqs):
        reference.adamw(*piece, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)


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
