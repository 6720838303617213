"""The ladder's products, each rung by itself. Nothing in the framework calls them: a library's are faster."""

import torch
from torch import Tensor

from cuda_ext import dispatch, library
from cuda_ext.matmul import reference

RUNGS = ("naive", "coalesced", "tiles", "registers", "ahead", "tensor", "wgmma", "specialised")


def matmul(a: Tensor, b: Tensor, rung: str = "ahead") -> Tensor:
    """a[M,K] b[K,N] -> [M,N] by one of RUNGS. From `tensor` on they take bfloat16 and float16; `wgmma` and
    `specialised` run on compute capability 9.0, with rows of `a` and `b` in multiples of 16 bytes."""
    if rung not in RUNGS:
        raise ValueError(f"rung {rung} is not there: choose one of {', '.join(RUNGS)}")
    if not dispatch.choose("matmul", a, b).kernel:
        return reference.matmul(a, b)
    c: Tensor = fused(a, b, RUNGS.index(rung))
    return c


@torch.library.custom_op("cuda_ext::matmul", mutates_args=())
def fused(a: Tensor, b: Tensor, rung: int) -> Tensor:
    """The kernel of rung number `rung`."""
    c = _like(a, b, rung)
    library.operators(a).matmul(rung, a.contiguous(), b.contiguous(), c)
    return c


@fused.register_fake
def _like(a: Tensor, b: Tensor, rung: int) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])
