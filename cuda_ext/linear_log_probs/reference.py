"""Log-probabilities of labels from hidden states: the definition. Logits exist for one chunk of rows at a time.

A backward pass written out by hand was no faster on a CPU (M=2048, D=96, V=2500: within noise); autograd's is kept.
`row_scores` and `row_gradient` are what the kernel does between the matrix products, in torch's words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 1 << 25  # logits held at once, 128 MiB in fp32


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    with_entropy: bool = False,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(z)[targets] with z = (hidden weight^T + bias) / temperature, and softmax(z)'s entropy in nats.

    hidden[M,D], weight[V,D], targets[M] int64, bias[V] -> (log_probs[M], entropy[M] or None), products and sums in at
    least fp32. Rows of `weight` from `vocab_size` on are padding and have no probability. With `soft_cap` c, logits x
    become c tanh(x / c) before they are divided (Gemma 2, 2024). Where M x V is large, rows go in chunks whose logits
    are computed again in the backward pass instead of being kept.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if vocab_size not in (None, len(weight)):  # a slice of all would cost a zeroed gradient and its copy
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    hidden, weight, bias = hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    rows = max(8, _CHUNK_LOGITS // len(weight) // 8 * 8)  # eights: strict mode needs them
    if len(hidden) <= rows:
        return _score(hidden, weight, targets, bias, temperature, with_entropy, soft_cap)
    parts = [
        checkpoint(_score, h, weight, t, bias, temperature, with_entropy, soft_cap, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    entropy = torch.cat([part[1] for part in parts]) if with_entropy else None
    return torch.cat([part[0] for part in parts]), entropy


def linear_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_log_probs`: (log_probs, entropy, log sum exp z), all [M]. The last one's square is the z-loss that
    keeps logits from drifting (Chowdhery et al. 2022, section 5)."""
    log_probs, entropy = linear_log_probs(hidden, weight, targets, bias, temperature, vocab_size, True, soft_cap)
    assert entropy is not None
    z = _capped(target_logits(hidden, weight, targets, bias), soft_cap) / temperature
    return log_probs, entropy, z - log_probs


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of logits[..., V] at `temperature`, in at least fp32: the one way from logits to log-probs, so
    that a generator which has logits agrees bit for bit with a trainer which has hidden states."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide if temperature == 1.0 else wide / temperature).log_softmax(-1)


def target_logits(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """[M]: each row's logit at its target, in at least fp32 whatever the logits are rounded to."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dots = (hidden.to(wide) * weight[targets].to(wide)).sum(1)
    return dots if bias is None else dots + bias[targets]


def row_scores(
    logits: Tensor, targets: Tensor, at_target: Tensor, temperature: float, soft_cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_probs, entropy, largest z, log sum exp(z - largest)), all [M], of logits[M,V] whose entry at the target is
    replaced by `at_target`[M]."""
    z = _z(logits, targets, at_target, temperature, soft_cap)
    largest, target = z.amax(1), z.gather(1, targets.unsqueeze(1)).squeeze(1)
    below = z - largest.unsqueeze(1)
    weights = below.exp()
    total = weights.sum(1)
    moment = torch.where(weights == 0, 0, weights * below).sum(1)
    return target - largest - total.log(), total.log() - moment / total, largest, total.log()


def row_gradient(
    logits: Tensor,
    targets: Tensor,
    at_target: Tensor,
    kept: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    temperature: float,
    soft_cap: float,
) -> Tensor:
    """d logits[M,V] from the `gradients`[M] of log_probs, entropy and log-sum-exp; `kept`[M] are largest z, log total
    and entropy. dz_j = g (1[j = t] - p_j) - h p_j (log p_j + H) + l p_j, through temperature and cap."""
    largest, log_total, entropy = (x.unsqueeze(1) for x in kept)
    g, h, l = (gradient.unsqueeze(1) for gradient in gradients)  # noqa: E741
    log_p = _z(logits, targets, at_target, temperature, soft_cap) - largest - log_total
    p = log_p.exp()
    dz = torch.where(p == 0, 0, p * (l - g - h * (log_p + entropy)))
    dz = dz.scatter_add(1, targets.unsqueeze(1), g) / temperature
    if not soft_cap:
        return dz
    logits = logits.to(dz.dtype).scatter(1, targets.unsqueeze(1), at_target.to(dz.dtype).unsqueeze(1))
    return dz * (1 - (logits / soft_cap).tanh().square())


def _z(logits: Tensor, targets: Tensor, at_target: Tensor, temperature: float, soft_cap: float) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.scatter(1, targets.unsqueeze(1), at_target.to(logits.dtype).unsqueeze(1))
    return _capped(logits, soft_cap) / temperature


def _capped(logits: Tensor, soft_cap: float) -> Tensor:
    return soft_cap * (logits / soft_cap).tanh() if soft_cap else logits


def _score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    with_entropy: bool,
    soft_cap: float,
) -> tuple[Tensor, Tensor | None]:
    table = log_softmax(_capped(F.linear(hidden, weight, bias), soft_cap), temperature)
    log_probs = table.gather(1, targets.unsqueeze(1)).squeeze(1)
    return log_probs, -(table.exp() * table).sum(1) if with_entropy else None
