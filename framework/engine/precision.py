"""Which dtype holds the weights, which one computes, and how one process keeps the two apart (sharded, FSDP2 does)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from framework.engine.config import Precision

MASTER = {Precision.FP32: torch.float32, Precision.BF16: torch.float32, Precision.FP64: torch.float64}
COMPUTE = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP64: torch.float64}


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `module` stand there cast to `dtype`; gradients arrive at the masters, in their dtype.

    Covers forward and backward, so that whatever is computed again in backward sees the same weights. Autocast would
    choose a dtype op by op and so round elsewhere than a sharded run does.
    """
    masters = [
        (owner, leaf, parameter)
        for owner in module.modules()
        for leaf, parameter in owner._parameters.items()
        if parameter is not None and parameter.dtype != dtype
    ]
    for owner, leaf, parameter in masters:
        owner._parameters[leaf] = parameter.to(dtype)  # type: ignore[assignment]  # a tensor with a way back
    try:
        yield
    finally:
        for owner, leaf, parameter in masters:
            owner._parameters[leaf] = parameter
