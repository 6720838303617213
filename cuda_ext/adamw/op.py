"""The AdamW update of many tensors at once, in place."""

from torch import Tensor

from cuda_ext import dispatch
from cuda_ext.adamw import reference


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
    reference.adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
    )
