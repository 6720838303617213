"""From logits to a token: filters, one uniform a token, inverse CDF, and the log-prob of what was drawn. All pure.

Two distributions stand here and are not the same one. The **draw** is from the kept set: logits divided by the
temperature, less what top-k, top-p and min-p remove (in that order, as transformers has it), renormalised. The
**log-prob** that is reported is of the temperature-scaled softmax over the whole vocabulary, without the filters: what
the trainer computes, so that generator - trainer is a difference of arithmetic alone and 0 in strict mode. With filters
on, the behaviour policy's own log-prob would be larger by -log(kept mass): a trainer that never sees the kept set
cannot know that term, and mixing the two puts it silently into PPO's ratio. Greedy draws report temperature 1.

How a token is drawn stands in `cuda_ext.sampling`.
"""

import torch
from torch import Tensor

from cuda_ext.sampling import op
from framework.core import random
from framework.core.errors import NonFiniteError
from framework.generation.config import SamplingConfig


def sampling_uniforms(seed: int, row: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """Float64 in [0, 1), broadcast over the int64 coordinates: the one random number of the token at (prompt-stream
    row, sample number, position in its row). Law Sampling."""
    return random.uniform(random.key(seed, "sampling"), row, sample, position)


def sample(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig, strict: bool = False) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of `logits` [N, V] with its own uniform [N]; returns (tokens [N], log_probs [N]).

    A row without a distribution (NaN, +inf, all -inf) draws some token whose log-prob is NaN: `require_finite` tells.
    `strict`: log-probs are a strict trainer's, bit for bit.
    """
    filters = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    tokens, log_probs, _ = op.sample(logits, uniforms, *filters, strict=strict)
    return tokens, log_probs


def require_finite(log_probs: Tensor) -> None:
    """Raise NonFiniteError where a drawn token has no log-prob: its logits were NaN, +inf, or all -inf."""
    bad = int(torch.isnan(log_probs).sum())
    if bad:
        raise NonFiniteError(
            f"the model's logits are NaN or infinite in {bad} of {len(log_probs)} rows being generated; nothing can be "
            "drawn from them: look for a non-finite loss or too large a learning rate in the run that made the weights"
        )
