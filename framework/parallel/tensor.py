"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022), as styles of modules.

Between the matrices of a block the places of a row are shared out over the tensor ranks; a block's first matrices are
cut by columns and its last one by rows, so that each block costs one gathering and one scattered sum of [B,T,D], either
way. A style cuts a module's parameters and says where its part stands (`Part`); it knows no model class. Cuts need not
be even. Left out: which module gets which style (the plan, beside the model's names).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cuda_ext.linear_log_probs.op import rows_of, shard_log_probs, uses_kernel
from cuda_ext.linear_log_probs.token_loss import TokenLoss, linear_token_loss
from framework.core.records import Metrics, whole
from framework.parallel.collectives import Ranks
from framework.parallel.movements import constant_sum, gather_alike, gather_places, scatter_places, sum_over
from framework.parallel.shard import Part

Parts = dict[str, Part]  # by the name of a parameter within its module
Style = Callable[[nn.Module, Ranks], Parts]
_TENSOR = "tensor"
_CHUNK_LOGITS = 1 << 25  # logits held at once, 128 MiB in fp32


def span(size: int, ranks: Ranks) -> tuple[int, int]:
    """(offset, length) of this rank's part of `size` things, as even as can be."""
    first, end = (size * place // ranks.size for place in (ranks.rank, ranks.rank + 1))
    return first, end - first


# --- styles ------------------------------------------------------------------------------------------------------


def columns(module: nn.Module, ranks: Ranks) -> Parts:
    """A linear map whose outputs are shared out: all of [B,T,D] in, this rank's columns out. Of an adapter, each rank
    has the way down whole and its columns of the way up."""
    parts = _cut(module, ranks, {"weight": 0, "bias": 0, "lora_b": 0, "lora_m": 0})
    return parts if not _has(module, "lora_a") else parts | {"lora_a": _partial(module, "lora_a", ranks)}


def rows(module: nn.Module, ranks: Ranks) -> Parts:
    """A linear map whose inputs are shared out: this rank's columns in, its places of the sum out. The bias is added
    once, there, and so learns from these places alone."""
    assert isinstance(module, nn.Linear)
    parts = _cut(module, ranks, {"weight": 1, "lora_a": 1})
    product = getattr(module, "product", None) or (lambda x: F.linear(x, module.weight))

    def forward(x: Tensor) -> Tensor:
        y = scatter_places(product(x), ranks)
        return y if module.bias is None else y + module.bias

    _exchange_forward(module, forward)
    if _has(module, "lora_m"):
        setattr(module, "over_inputs", partial(constant_sum, ranks=ranks))  # noqa: B010
    return parts | {name: _partial(module, name, ranks) for name in ("bias", "lora_b", "lora_m") if _has(module, name)}


def summand_rows(module: nn.Module, ranks: Ranks) -> Parts:
    """As `rows`, where somebody else adds up what the ranks give: a summand [B,T,O] out, no bias."""
    return _cut(module, ranks, {"weight": 1})


def stacked_columns(module: nn.Module, ranks: Ranks) -> Parts:
    """Matrices [E,O,I], one upon another, whose outputs are shared out: each rank has its columns of them all."""
    return _cut(module, ranks, {"weight": 1})


def stacked_rows(module: nn.Module, ranks: Ranks) -> Parts:
    """Matrices [E,O,I] whose inputs are shared out: a summand out, which somebody else adds up."""
    return _cut(module, ranks, {"weight": 2})


def vocabulary(module: nn.Module, ranks: Ranks) -> Parts:
    """An embedding whose rows are shared out: ids in, this rank's places of hidden states out."""
    assert isinstance(module, nn.Embedding)
    first, length = span(module.num_embeddings, ranks)
    parts = _cut(module, ranks, {"weight": 0})

    def forward(ids: Tensor) -> Tensor:
        mine = ids - first
        outside = (mine < 0) | (mine >= length)
        found = F.embedding(mine.masked_fill(outside, 0), module.weight)
        return scatter_places(found.masked_fill(outside.unsqueeze(-1), 0), ranks)

    _exchange_forward(module, forward)
    return parts


def columns_of_table(module: nn.Module, ranks: Ranks) -> Parts:
    """A table [rows, heads] that each rank has the columns of its own heads of."""
    return _cut(module, ranks, {"weight": 1})


def places(module: nn.Module, ranks: Ranks) -> Parts:
    """A module that meets this rank's places alone (a norm), or whose outcome goes into a summand of this rank's (a
    router of experts): whole, its gradients are sums over the tensor ranks."""
    return {name: _partial(module, name, ranks) for name, _ in module.named_parameters(recurse=False)}


def own_places(module: nn.Module, ranks: Ranks) -> Parts:
    """A module that gives all places, of which this rank goes on with its own (an embedding of positions)."""
    module.register_forward_hook(lambda module, inputs, y: y.chunk(ranks.size, dim=1)[ranks.rank])
    return places(module, ranks)


def all_places(module: nn.Module, ranks: Ranks) -> Parts:
    """A block that needs all places of its first input. Its own parameters are its parts' business."""
    module.register_forward_pre_hook(lambda module, inputs: (gather_places(inputs[0], ranks), *inputs[1:]))
    return {}


def all_places_to_own(module: nn.Module, ranks: Ranks) -> Parts:
    """A block that needs all places of its first input and gives a summand of each: this rank's places of the sum."""
    module.register_forward_hook(lambda module, inputs, y: scatter_places(y, ranks))
    return all_places(module, ranks)


def ends_whole(module: nn.Module, ranks: Ranks) -> Parts:
    """A module whose output's places are gathered for something that is cut over the tensor ranks as well."""
    module.register_forward_hook(lambda module, inputs, y: gather_places(y, ranks))
    return {}


def ends_whole_for_all(module: nn.Module, ranks: Ranks) -> Parts:
    """A module whose output's places are gathered for something that every tensor rank does as a whole."""
    module.register_forward_hook(lambda module, inputs, y: gather_alike(y, ranks))
    return {}


class VocabularyLogProbs(nn.Module):
    """Log-probs of labels where each tensor rank holds some rows of the head: the logits are never gathered, three or
    four numbers a label are. Takes the place of a module of the same signature."""

    def __init__(self, temperature: float, vocab_size: int, ranks: Ranks):
        super().__init__()
        self.temperature, self.ranks = temperature, ranks
        self.first, self.length = span(vocab_size, ranks)
        self.longest = -(-vocab_size // ranks.size)  # of any rank's shards: all go in chunks of as many labels
        self._agreed: dict[torch.dtype, bool] = {}

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        vocab_size: int,
        with_entropy: bool,
        token_loss: TokenLoss | None = None,
        rows: Any = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Metrics]:
        """hidden[M,D], weight[v,D] and bias[v] of this rank, labels[M] -> (log_probs[M], entropy[M] or None), in at
        least fp32. With `token_loss`, its (loss, metrics) of these and `rows`, a record of [M]."""
        if not self._all_use_kernel(hidden, weight):
            scores = self._log_probs(hidden, weight, bias, labels, with_entropy)
            return scores if token_loss is None else token_loss(*scores, rows)
        mine, chunk = labels - self.first, rows_of(self.longest)
        if token_loss is not None:
            words = bias, self.temperature, None, with_entropy
            return linear_token_loss(hidden, weight, mine, token_loss, rows, *words, chunk=chunk, gather=self._gather)
        both = shard_log_probs(hidden, weight, mine, self._gather, bias, self.temperature, chunk=chunk)
        return both if with_entropy else (both[0], None)

    def _all_use_kernel(self, hidden: Tensor, weight: Tensor) -> bool:
        """On GPUs asked of all ranks once for a dtype: a node may lack the library, and all must do alike."""
        mine = uses_kernel(hidden, weight)
        if hidden.device.type == "cpu":  # a matter of this process's environment, which ranks share
            return mine
        if hidden.dtype not in self._agreed:
            told = self.ranks.gather(torch.tensor([int(mine)], device=hidden.device), "whether kernels run")
            self._agreed[hidden.dtype] = bool(told.all())
        return self._agreed[hidden.dtype]

    def _gather(self, x: Tensor) -> Tensor:
        return self.ranks.gather(x, "what the shards of the vocabulary know of a label")

    def _log_probs(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden, weight, bias = hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
        chunk = max(8, _CHUNK_LOGITS // len(weight))
        parts = [
            self._score(h, weight, bias, t, with_entropy)
            if len(hidden) <= chunk
            else checkpoint(self._score, h, weight, bias, t, with_entropy, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), labels.split(chunk), strict=True)
        ]
        entropy = torch.cat([entropy for _, entropy in parts]) if with_entropy else None
        return torch.cat([log_probs for log_probs, _ in parts]), entropy

    def _score(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight, bias) / self.temperature
        logits = logits - self.ranks.largest(logits.detach().amax(1, keepdim=True), "the logits")
        mine = labels - self.first
        outside = (mine < 0) | (mine >= self.length)
        label = logits.gather(1, mine.masked_fill(outside, 0).unsqueeze(1)).squeeze(1).masked_fill(outside, 0)
        weights = logits.exp()
        expected = (weights * logits).sum(1) if with_entropy else torch.zeros_like(label)
        label, total, expected = sum_over(torch.stack([label, weights.sum(1), expected]), self.ranks).unbind()
        return label - total.log(), total.log() - expected / total


def _exchange_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    module.forward = forward


# --- parameters ----------------------------------------------------------------------------------------------------


def _cut(module: nn.Module, ranks: Ranks, dims: Mapping[str, int]) -> Parts:
    """Leave this rank's part of each named parameter, cut along its dimension."""
    parts = {}
    for name, dim in dims.items():
        parameter = module._parameters.get(name)
        if parameter is None:
            continue
        box = list(whole(parameter.shape))
        box[dim] = span(parameter.shape[dim], ranks)
        part = torch.empty([length for _, length in box], dtype=parameter.dtype, device=parameter.device)
        module._parameters[name] = nn.Parameter(part, parameter.requires_grad)
        parts[name] = Part(tuple(parameter.shape), tuple(box))
    return parts


def _has(module: nn.Module, name: str) -> bool:
    return module._parameters.get(name) is not None


def _partial(module: nn.Module, name: str, ranks: Ranks) -> Part:
    parameter = module.get_parameter(name)
    return Part(tuple(parameter.shape), whole(parameter.shape), speaks=ranks.rank == 0, summed_over=_TENSOR)
