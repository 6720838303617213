"""AdamW: the definition, in single IEEE operations."""

import torch
from torch import Tensor


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
    """One decoupled-decay Adam update, number `step` from 1 (Loshchilov & Hutter 2019, algorithm 2), in place.

    m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  p <- (1 - lr wd) p - lr/(1-b1^t) m / (sqrt(v)/sqrt(1-b2^t) + eps).

    Every operation rounds once, so the bits of an element depend on that element alone, not on its place in a shard:
    by construction, where addcmul, addcdiv, lerp and fused updates leave multiply-adds to the build.
    """
    if not params:
        return
    torch._foreach_mul_(exp_avgs, beta1)
    torch._foreach_add_(exp_avgs, torch._foreach_mul(grads, 1 - beta1))
    squares = torch._foreach_mul(grads, grads)
    torch._foreach_mul_(squares, 1 - beta2)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_add_(exp_avg_sqs, squares)

    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(exp_avgs, denominators)
    torch._foreach_mul_(updates, lr / (1 - beta1**step))
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_sub_(params, updates)
