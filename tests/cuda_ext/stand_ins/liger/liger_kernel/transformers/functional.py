"""Liger 0.8.5 (liger_kernel/transformers/functional.py): signatures of what the benchmarks call, computed by torch."""

import torch
import torch.nn.functional as F


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    return F.rms_norm(X, W.shape, W, eps)


def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    return F.rms_norm(X + R, W.shape, W, eps), X + R


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_swiglu(a, b):
    return F.silu(a) * b


def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turned = [torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) for x in (q, k)]
    return tuple((x * cos + y * sin).to(x.dtype) for x, y in zip((q, k), turned, strict=True))


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
    return_token_accuracy=False, return_predicted_tokens=False, chunk_mem_const=1,
):  # fmt: skip
    return F.cross_entropy((input @ weight.t()).float(), target, ignore_index=ignore_index, reduction=reduction)
