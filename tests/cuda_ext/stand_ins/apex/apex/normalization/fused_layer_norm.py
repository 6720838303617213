"""Its signatures (apex/normalization/fused_layer_norm.py at 014f30f7); like the kernels, these take one dtype."""

import torch
import torch.nn.functional as F


def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype == bias.dtype
    assert not torch.is_autocast_enabled("cpu")
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype
    assert not torch.is_autocast_enabled("cpu")
    return F.rms_norm(input, normalized_shape, weight, eps)
