"""From logits to a token: filters, one uniform a token, inverse CDF, and the log-prob of what was drawn. All pure.

Two distributions stand here and are not the same one. The **draw** is from the kept set: logits divided by the
temperature, less what top-k, top-p and min-p remove (in that order, as transformers has it), renormalised. The
**log-prob** that is reported is of the temperature-scaled softmax over the whole vocabulary, without the filters: what
the trainer computes, so that generator - trainer is a difference of arithmetic alone and 0 in strict mode. With filters
on, the behaviour policy's own log-prob would be larger by -log(kept mass): a trainer that never sees the kept set
cannot know that term, and mixing the two puts it silently into PPO's ratio. Greedy draws report temperature 1.

The draw adds integers, not floats: probabilities become whole multiples of 2**-48, whose running sums are exact in any
order. A token therefore depends on its own row's logits and uniform alone, on any device and under any batching, and
what has probability below 2**-48 or was filtered has weight 0 and cannot be drawn, whatever the uniform.
"""

import torch
from torch import Tensor

from cuda_ext.linear_log_probs.op import log_softmax
from framework.core import random
from framework.core.errors import NonFiniteError
from framework.generation.config import SamplingConfig

_ONE = 1 << 48  # the integer that stands for probability 1; sums of it stay exact as doubles too


def sampling_uniforms(seed: int, row: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """Float64 in [0, 1), broadcast over the int64 coordinates: the one random number of the token at (prompt-stream
    row, sample number, position in its row). Law Sampling."""
    return random.uniform(random.key(seed, "sampling"), row, sample, position)


def sample(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of `logits` [N, V] with its own uniform [N]; returns (tokens [N], log_probs [N]).

    A row without a distribution (NaN, +inf, all -inf) draws some token whose log-prob is NaN: `require_finite` tells.
    """
    tokens = logits.argmax(-1) if sampling.temperature == 0 else draw(token_weights(logits, sampling), uniforms)
    return tokens, token_log_probs(logits, tokens, sampling.temperature)


def token_weights(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """int64 [N, V]: weights in proportion to the probabilities among the kept tokens, 0 for what is filtered out."""
    scaled = _keep_top_k(logits.double() / sampling.temperature, sampling.top_k)
    probabilities = torch.softmax(scaled, dim=-1)
    weights = (probabilities * _ONE).long()
    if sampling.top_p < 1:
        weights = _keep_top_p(weights, sampling.top_p)
    if sampling.min_p > 0:
        floor = sampling.min_p * probabilities.amax(-1, keepdim=True)
        weights = torch.where(probabilities >= floor, weights, 0)
    return weights


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse CDF: the token in whose share of the running sum uniform x total falls. [N, V], [N] -> [N].

    Weights (1, 0, 3): a uniform below 0.25 draws token 0, any other draws token 2.
    """
    running = weights.cumsum(-1)
    total = running[:, -1:]
    target = (uniforms[:, None] * total).long().minimum(total - 1)  # a uniform next to 1 may round up to the total
    drawn = torch.searchsorted(running, target, right=True).squeeze(-1)
    return drawn.clamp(max=weights.shape[-1] - 1)  # a row without a distribution stays inside the vocabulary


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """[N]: log of the full-vocabulary softmax of logits / temperature at `tokens`; temperature 0 reports that of 1."""
    return log_softmax(logits, temperature or 1.0).gather(-1, tokens[:, None]).squeeze(-1)


def require_finite(log_probs: Tensor) -> None:
    """Raise NonFiniteError where a drawn token has no log-prob: its logits were NaN, +inf, or all -inf."""
    bad = int(torch.isnan(log_probs).sum())
    if bad:
        raise NonFiniteError(
            f"the model's logits are NaN or infinite in {bad} of {len(log_probs)} rows being generated; nothing can be "
            "drawn from them: look for a non-finite loss or too large a learning rate in the run that made the weights"
        )


def _keep_top_k(scaled: Tensor, k: int) -> Tensor:
    """Ties with the k-th largest are kept, so that no order among equals has to be invented."""
    if k == 0 or k >= scaled.shape[-1]:
        return scaled
    smallest = scaled.topk(k, dim=-1).values[:, -1:]
    return scaled.masked_fill(scaled < smallest, float("-inf"))


def _keep_top_p(weights: Tensor, top_p: float) -> Tensor:
    """Keep a token while those before it (more probable, or equal with a lower id) hold less than top_p."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    running = ordered.cumsum(-1)
    kept = torch.where(running - ordered < top_p * running[:, -1:], ordered, 0)
    return torch.zeros_like(weights).scatter(-1, order, kept)
