"""From logits to a token: filters, one uniform, inverse CDF: the definition.

The draw adds integers, not floats: probabilities become whole multiples of 2**-48, whose running sums are exact in any
order. A token therefore depends on its own row's logits and uniform alone, on any device and under any batching, and
what has probability below 2**-48 or was filtered has weight 0 and cannot be drawn, whatever the uniform.
"""

import torch
from torch import Tensor

from cuda_ext.linear_log_probs.reference import log_softmax

_ONE = 1 << 48  # the integer that stands for probability 1; sums of it stay exact as doubles too


def sample(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, with_kept: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw a token for each row of logits[N,V] with its own uniform[N], float64 in [0, 1).

    (tokens[N]; their log-probs[N] in the softmax of logits / temperature over the whole vocabulary; `with_kept`, those
    among what the filters keep, else None). Temperature 0 is greedy, and reports temperature 1 and 0. A row without a
    distribution (NaN, +inf, all -inf) draws some token whose log-prob is NaN.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        log_probs = token_log_probs(logits, tokens, temperature)
        return tokens, log_probs, torch.where(log_probs.isnan(), log_probs, 0) if with_kept else None
    weights = token_weights(logits, temperature, top_k, top_p, min_p)
    tokens = draw(weights, uniforms)
    log_probs = token_log_probs(logits, tokens, temperature)
    if not with_kept:
        return tokens, log_probs, None
    kept = (weights.gather(-1, tokens[:, None]).double() / weights.sum(-1, keepdim=True)).log().squeeze(-1)
    return tokens, log_probs, torch.where(log_probs.isnan(), log_probs, kept.to(log_probs.dtype))


def token_weights(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """int64 [N, V]: weights in proportion to the probabilities among the kept tokens, 0 for what is filtered out by
    top-k, top-p and min-p, in this order."""
    scaled = _keep_top_k(logits.double() / temperature, top_k)
    probabilities = torch.softmax(scaled, dim=-1)
    weights = (probabilities * _ONE).long()
    if top_p < 1:
        weights = _keep_top_p(weights, top_p)
    if min_p > 0:
        floor = min_p * probabilities.amax(-1, keepdim=True)
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


def _keep_top_k(scaled: Tensor, k: int) -> Tensor:
    """Ties with the k-th largest are kept, so that no order among equals has to be invented."""
    if k == 0 or k >= scaled.shape[-1]:
        return scaled
    smallest = scaled.topk(k, dim=-1).values[:, -1:]
    return scaled.masked_fill(scaled < smallest, float("-inf"))


def _keep_top_p(weights: Tensor, top_p: float) -> Tensor:
    """Keep a token while those before it (more probable, or equal with a lower id) hold less than top_p. Torch compares
    an integer with what a number makes of integers in fp32: there, to 2**-24 of the whole."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    running = ordered.cumsum(-1)
    kept = torch.where(running - ordered < top_p * running[:, -1:], ordered, 0)
    return torch.zeros_like(weights).scatter(-1, order, kept)
