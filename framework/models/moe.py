"""A mixture of experts in place of a feed-forward block (Shazeer et al. 2017; Qwen3-MoE, Qwen2-MoE, DeepSeekMoE).

    y = sum of w_e expert_e(x) over the top_k experts e of largest p_e, p = softmax(router x) in fp32
        w = p, or p / (their sum)                                                 config: normalise
        + shared(x), or sigmoid(shared_gate x) shared(x)                          config: shared, shared_gate

There is no capacity: each token is computed by all of its experts, and none is dropped. Experts lie stacked, one matrix
a first index; tokens are sorted by expert, so that a stack meets each of them once. Law On-policy: an expert's rows
come in eights, filled up with zeros, strict or not, for how many choose it differs from batch to batch, and
a token's experts are added up in the order of their weights.

The load-balance loss is that of a sequence (DeepSeek-V2, section 2.2.3; DeepSeek-V3, equations 17 to 20). Of row b with
T_b real tokens, in each layer:

    f_e = E / (top_k T_b) x how many of its tokens chose e        P_e = the mean over its tokens of p_e
    loss = balance / rows x sum over rows b and layers of sum_e f_e P_e             1 a row and layer where all is even

It is linear in rows, so any split of a batch gives the same gradient (law Tokens). That of Switch (Fedus et al. 2021,
equations 4 to 6) takes f and P over a whole batch, where a split would change it; of one row they are the same. Padding
has no part in it; a packed row counts as one sequence. Its gradient enters the router's probabilities where they
arise, and the loss that is reported stays the language model's; the mean of sum_e f_e P_e is reported beside it.

Left out: grouped products in one kernel (torch.nn.functional.grouped_mm; here a loop over experts, which on a GPU waits
for their token counts), experts of their own ranks (expert parallelism), biases, noise in the router, balance by bias
(DeepSeek-V3, section 2.1.2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuda_ext.moe.op import permute, unpermute
from cuda_ext.swiglu.op import swiglu
from framework.models.config import Activation, ModelConfig
from framework.models.layers import MLP, Linear, activation, strict_activation

_ROWS = 8  # an expert's rows come in a multiple of it


class Experts(nn.Module):
    """`weight[E,O,I]`: one matrix an expert."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """x[M,I], of which the first sizes[0] rows are expert 0's, and so on -> [M,O]."""
        parts = zip(x.split(sizes), self.weight.unbind(), strict=True)
        return torch.cat([F.linear(rows, matrix) for rows, matrix in parts])


class ExpertMLP(nn.Module):
    """down(act(gate(x)) * up(x)) of each row's own expert."""

    def __init__(self, config: ModelConfig, strict: bool):
        super().__init__()
        experts, hidden, inner = config.moe.experts, config.hidden_size, config.expert_size
        self.gate = Experts(experts, hidden, inner)
        self.up = Experts(experts, hidden, inner)
        self.down = Experts(experts, inner, hidden)
        self.activation, self.strict = config.activation, strict

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """x[M,D] sorted by expert, sizes[E] -> [M,D]."""
        gate, up = self.gate(x, sizes), self.up(x, sizes)
        if self.activation is Activation.SWIGLU:
            return self.down(swiglu(gate, up, strict=self.strict), sizes)
        act = strict_activation if self.strict else activation
        return self.down(act(gate, self.activation) * up, sizes)


class Balance(nn.Module):
    """The place where the load-balance loss pulls at the router. Without parameters, so that a plan can put one of
    coefficient 0 here, where another rank routes alike and pulls. `rows`: how many sequences the optimizer step holds,
    over all ranks; 0 = nobody asked, and nothing is done. `seen`: (sum of sum_e f_e P_e, rows) since last taken."""

    def __init__(self, coefficient: float):
        super().__init__()
        self.coefficient = coefficient
        self.rows = 0.0
        self.seen: Tensor | None = None

    def forward(self, probabilities: Tensor, chosen: Tensor, real: Tensor | None) -> Tensor:
        """probabilities[B,T,E] as they are; chosen[B,T,k], real[B,T] (True = no padding; None = all)."""
        if not (self.rows and torch.is_grad_enabled()):
            return probabilities
        pull = balance_gradient(probabilities.detach(), chosen, real)
        losses = (pull * probabilities.detach()).sum((1, 2), dtype=torch.float64)
        seen = torch.stack([losses.sum(), (losses > 0).sum()])  # a row of padding alone has none
        self.seen = seen if self.seen is None else self.seen + seen
        return _Pull.apply(probabilities, pull * (self.coefficient / self.rows)) if self.coefficient else probabilities


class Mixture(nn.Module):
    """See above. `layer.mlp` of a layer with experts."""

    def __init__(self, config: ModelConfig, strict: bool):
        super().__init__()
        moe, hidden = config.moe, config.hidden_size
        self.router = Linear(hidden, moe.experts, False, strict)
        self.balance = Balance(moe.balance)
        self.experts = ExpertMLP(config, strict)
        self.shared = MLP(config, strict, moe.shared) if moe.shared else None
        self.shared_gate = Linear(hidden, 1, False, strict) if moe.shared_gate else None
        self.num_experts, self.top_k, self.normalise = moe.experts, moe.top_k, moe.normalise

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """x[B,T,D] -> [B,T,D]; real[B,T]: False where a place is padding (None: nowhere)."""
        weights, chosen = self.route(x, real)
        y = self._mixed(x.flatten(0, -2), weights.flatten(0, -2), chosen.flatten(0, -2)).view_as(x)
        if self.shared is None:
            return y
        beside = self.shared(x)
        return y + (beside if self.shared_gate is None else self._sigmoid(self.shared_gate(x)) * beside)

    def _sigmoid(self, x: Tensor) -> Tensor:
        """Strict, through tanh: an element's bits then depend on it alone."""
        return 0.5 + 0.5 * torch.tanh(0.5 * x) if self.router.strict else torch.sigmoid(x)

    def route(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x[B,T,D] -> (weights[B,T,k] in x's dtype, experts chosen[B,T,k] int64), the heaviest first."""
        logits = self.router(x)
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        chosen = probabilities.detach().topk(self.top_k, -1).indices
        weights = self.balance(probabilities, chosen, real).gather(-1, chosen)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen

    def _mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x[N,D], weights[N,k], chosen[N,k] -> [N,D]."""
        flat, sizes = places(chosen.flatten(), self.num_experts)
        rows = flat.view_as(chosen)
        return unpermute(self.experts(permute(x, rows, sum(sizes)), sizes), rows, weights)


def places(chosen: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Where each of chosen[M] goes when they are sorted by expert: (rows[M], rows of each expert, a multiple of 8)."""
    counts = chosen.bincount(minlength=experts)
    more = -counts % _ROWS
    before = more.cumsum(0) - more
    order = chosen.argsort(stable=True)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return rows + before[chosen], (counts + more).tolist()


def balance_gradient(probabilities: Tensor, chosen: Tensor, real: Tensor | None = None) -> Tensor:
    """What the sum over rows of sum_e f_e P_e grows by with each of probabilities[B,T,E]: f_e / T_b, and 0 at padding.
    chosen[B,T,k], real[B,T]. f counts choices and has no gradient."""
    taken = torch.zeros_like(probabilities, requires_grad=False).scatter_(-1, chosen, 1.0)
    if real is None:
        real = torch.ones(chosen.shape[:2], dtype=torch.bool, device=chosen.device)
    kept = real.to(taken.dtype).unsqueeze(-1)
    length = kept.sum(1, keepdim=True).clamp(min=1)
    frequency = (taken * kept).sum(1, keepdim=True) * (taken.shape[-1] / chosen.shape[-1]) / length
    return frequency / length * kept


class _Pull(torch.autograd.Function):
    """Passes x through and adds `pull` to its gradient, as if <x, pull> were part of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pull: Tensor) -> Tensor:
        ctx.save_for_backward(pull)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (pull,) = ctx.saved_tensors
        return gradient + pull, None
