"""Losses of pairs: a reward model's ranking loss, and direct preference optimisation without a reward model.

All inputs are one number a pair, [B]. Rows that only fill up a batch are left out by the caller (`record.select`).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from framework.core.errors import UsageError, nearest
from framework.core.masked import ratio
from framework.core.records import Metrics


def pairwise_ranking_loss(
    chosen: Tensor,
    rejected: Tensor,
    num_pairs: Tensor | float,
    margin: Tensor | None = None,
    center_coefficient: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry: L = -(1/N) Σ log σ(r_c - r_r - m) + c (r_c + r_r)²  (Ouyang et al. 2022, eq. 1).

    chosen, rejected [B] float: scores of the two answers to one prompt. num_pairs: N of the whole optimizer step.
    margin [B] float: by how much the chosen one must win (Touvron et al. 2023, eq. 2). center_coefficient pulls the
    sum of a pair's scores to zero (Eisenstein et al. 2023, eq. 2), which the ranking itself leaves free. At equal
    scores, margin 0 and coefficient 0 the loss is ln 2.

    Metrics: `loss`; `accuracy`, the share with r_c > r_r, the margin not counted and a tie wrong; `score_margin`,
    r_c - r_r; `score_chosen` and `score_rejected`.
    """
    gap = chosen - rejected
    losses = -logsigmoid(gap if margin is None else gap - margin)
    if center_coefficient:
        losses = losses + center_coefficient * (chosen + rejected).square()
    metrics = _means(
        loss=losses, accuracy=chosen > rejected, score_margin=gap, score_chosen=chosen, score_rejected=rejected
    )
    return ratio(losses.sum(), num_pairs), metrics


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    num_pairs: Tensor | float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimisation. With h = log π(y_c)/π_ref(y_c) - log π(y_r)/π_ref(y_r) a pair's loss is

        sigmoid  -(1-ε) log σ(βh) - ε log σ(-βh)    Rafailov et al. 2023, eq. 7; ε: Mitchell 2023 ("conservative")
        hinge    max(0, 1 - βh)                     Zhao et al. 2023 (SLiC)
        ipo      (h - 1/(2β))²                      Azar et al. 2023, eq. 17

    policy_*, reference_* [B] float: log-probability of the whole response, its token log-probs summed, in nats; the
    reference's carry no gradient. num_pairs: N of the whole optimizer step. ε (label_smoothing) is the share of pairs
    thought to be labelled wrongly, for `sigmoid` alone.

    IPO is often run on log-probs averaged over the response (so does trl): hand in averages for that. At equal
    models the losses are ln 2, 1 and 1/(4β²).

    Metrics: `loss`; with the implicit rewards β log π/π_ref: `accuracy` (chosen above rejected, a tie wrong),
    `reward_margin` (βh), `reward_chosen`, `reward_rejected`.
    """
    if kind not in _DPO_KINDS:
        raise UsageError(f"unknown dpo_loss kind '{kind}': {nearest(kind, _DPO_KINDS)}")
    if label_smoothing and kind != "sigmoid":
        raise UsageError(f"label_smoothing={label_smoothing} has no meaning for kind '{kind}'; only for 'sigmoid'")
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    losses = _DPO_KINDS[kind](chosen - rejected, beta, label_smoothing)
    metrics = _means(
        loss=losses,
        accuracy=chosen > rejected,
        reward_margin=beta * (chosen - rejected),
        reward_chosen=beta * chosen,
        reward_rejected=beta * rejected,
    )
    return ratio(losses.sum(), num_pairs), metrics


def answer_loss(log_probs: Tensor, lengths: Tensor, num_pairs: Tensor | float) -> tuple[Tensor, Metrics]:
    """How unlikely the chosen answers themselves are: L = -(1/N) Σ log π(y_c) / |y_c|, in nats a token. Beside
    `dpo_loss` it keeps them from becoming rarer along with the rejected ones (Pang et al. 2024, eq. 1, whose length is
    that of prompt and answer together).

    log_probs [B] float: of whole answers, in nats. lengths [B]: their tokens. num_pairs: N of the whole optimizer step.
    Each answer counts alike, however long.

    Metrics: `sft_loss`.
    """
    losses = -log_probs / lengths
    return ratio(losses.sum(), num_pairs), {"sft_loss": (losses.detach().sum(), losses.new_tensor(len(losses)))}


def _sigmoid(h: Tensor, beta: float, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(beta * h) - smoothing * logsigmoid(-beta * h)


def _hinge(h: Tensor, beta: float, _: float) -> Tensor:
    return torch.relu(1 - beta * h)


def _ipo(h: Tensor, beta: float, _: float) -> Tensor:
    return (h - 1 / (2 * beta)).square()


_DPO_KINDS: dict[str, Callable[[Tensor, float, float], Tensor]] = {"sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo}


def _means(**pairs: Tensor) -> Metrics:
    """(sum, number of pairs) of each [B] tensor."""
    dtype = pairs["loss"].dtype
    return {name: (x.detach().to(dtype).sum(), x.new_tensor(len(x), dtype=dtype)) for name, x in pairs.items()}
