"""A token of each row of logits, and what probability it had."""

import torch
from torch import Tensor

from cuda_ext import dispatch, library
from cuda_ext.sampling import reference


def sample(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    with_kept: bool = False,
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `reference.sample`. logits[N,V], uniforms[N] float64 -> (tokens[N], log_probs[N], kept_log_probs[N] or None).

    top_k 0, top_p 1 and min_p 0 are off. `strict`: log-probs in the bits that `linear_log_probs` gives, which the
    kernel's are not.
    """
    if strict:
        dispatch.announce("sampling", dispatch.STRICT)
    elif dispatch.choose("sampling", logits).kernel:
        tokens, log_probs, kept = fused(logits, uniforms, temperature, top_k, top_p, min_p)
        return tokens, log_probs, kept if with_kept else None
    return reference.sample(logits, uniforms, temperature, top_k, top_p, min_p, with_kept)


@torch.library.custom_op("cuda_ext::sampling", mutates_args=())
def fused(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel: tokens int64, log_probs and kept_log_probs fp32, all [N]."""
    out = _like(logits, uniforms, temperature, top_k, top_p, min_p)
    rows = logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()
    library.operators(logits).sampling_draw(
        rows, uniforms.double().contiguous(), temperature, top_k, top_p, min_p, *out
    )
    return out


@fused.register_fake
def _like(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    log_probs, kept = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    return logits.new_empty(len(logits), dtype=torch.int64), log_probs, kept
