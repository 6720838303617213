"""A pointwise loss straight from hidden states: its gradient is taken chunk by chunk, so that logits are computed once.

6 M D V operations where a loss that looks at all log-probs at once needs 8: `linear_log_probs`. Left out: losses whose
token terms are not summed one by one (sequence ratios, pairs), gradients of anything but hidden, weight and bias, and
shards of a vocabulary without the kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cuda_ext import library
from cuda_ext.linear_log_probs import reference
from cuda_ext.linear_log_probs.op import Gather, Gradients, chunks, merge, of_one_dtype, rows_of, uses_kernel

Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, weight), which add over chunks
TokenLoss = Callable[[Tensor, Tensor | None, Any], tuple[Tensor, Metrics]]


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    rows: Any,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    with_entropy: bool = False,
    soft_cap: float = 0.0,
    chunk: int | None = None,
    gather: Gather | None = None,
) -> tuple[Tensor, Metrics]:
    """The (loss, metrics) of `token_loss(log_probs, entropy or None, rows)`, a sum over labels divided by something
    global, which it knows. hidden[M,D], weight[V,D], targets[M]; `rows` is a pytree of tensors [M,...].

    `token_loss` sees some rows at a time; what it gives is added up, metrics as well. The gradients of hidden, weight
    and bias are made in the forward pass, if any of them wants one. With `gather`, weight and bias are a shard of the
    vocabulary (see `shard_log_probs`), and every shard must be called alike, with one `chunk`: each is one gathering.
    """
    kernel = uses_kernel(hidden, weight)
    if gather is not None and not kernel:
        raise ValueError("a shard of a vocabulary needs the kernel, which does not run here: see cuda_ext.explain()")
    if kernel:
        hidden, weight = of_one_dtype(hidden, weight)
    else:
        wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        hidden, weight = hidden.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(torch.promote_types(weight.dtype, torch.float32))
    size = len(weight) if vocab_size is None else vocab_size
    call = _Call(token_loss, rows, targets.contiguous(), temperature, soft_cap, size, with_entropy,
                 chunk or rows_of(len(weight)), kernel, gather)  # fmt: skip
    loss: Tensor = _InForward.apply(hidden, weight, bias, call)
    return loss, call.metrics


class _Call:
    """All that is no leaf of the graph, and the metrics on their way out."""

    def __init__(
        self,
        token_loss: TokenLoss,
        rows: Any,
        targets: Tensor,
        temperature: float,
        soft_cap: float,
        vocab_size: int,
        with_entropy: bool,
        chunk: int,
        kernel: bool,
        gather: Gather | None,
    ):
        self.token_loss, self.rows, self.targets, self.gather = token_loss, rows, targets, gather
        self.scale, self.vocab_size = (temperature, soft_cap), vocab_size
        self.with_entropy, self.chunk, self.kernel = with_entropy, chunk, kernel
        self.metrics: Metrics = {}
        self.with_gradients = torch.is_grad_enabled()  # which it is not within an autograd.Function

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The loss, and the gradients that `needs` asks for."""
        hidden, weight = hidden.contiguous(), weight.contiguous()
        total = Gradients(hidden, weight, bias, needs[0], needs[1])
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if not len(hidden):
            loss = loss + self._loss(slice(0, 0), loss.new_zeros(0), loss.new_zeros(0), False)[0]
        for rows, padded, logits in chunks(hidden, weight, self.chunk):
            at_target = self._target_logits(hidden[rows], weight, bias, rows)
            log_probs, entropy, *kept = self._scores(logits, bias, rows, at_target)
            part, of_scores = self._loss(rows, log_probs, entropy, any(needs))
            loss = loss + part
            if any(needs):
                self._to_gradient(logits, bias, rows, at_target, (*kept, entropy), of_scores)
                total.add(rows, padded, logits)
        return loss, total.result()

    def _loss(self, rows: slice, log_probs: Tensor, entropy: Tensor, learns: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Of some rows: the loss, and its gradients by log_probs, entropy and log sum exp."""
        leaves = log_probs.requires_grad_(learns), entropy.requires_grad_(learns)
        own = pytree.tree_map(lambda x: x[rows] if isinstance(x, Tensor) else x, self.rows)
        with torch.set_grad_enabled(learns):
            loss, metrics = self.token_loss(leaves[0], leaves[1] if self.with_entropy else None, own)
        for name, (value, weight) in metrics.items():
            before = self.metrics.get(name, (0, 0))
            self.metrics[name] = (before[0] + value.detach(), before[1] + weight.detach())
        if not loss.requires_grad:  # nobody asks, or no label counts
            return loss, (torch.zeros_like(log_probs),) * 3
        found = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
        return loss.detach(), (*found, torch.zeros_like(log_probs))

    def _target_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        targets = self.targets[rows]
        if not self.kernel:
            return reference.target_logits(hidden, weight, targets, bias)
        out = hidden.new_empty(len(hidden), dtype=torch.float32)
        library.operators(hidden).linear_log_probs_target(
            hidden, weight, bias, targets, float("nan") if self.gather is None else 0.0, self.vocab_size, out
        )
        return out

    def _scores(self, logits: Tensor, bias: Tensor | None, rows: slice, at_target: Tensor) -> tuple[Tensor, ...]:
        """log_probs, entropy, largest, log_total."""
        targets = self.targets[rows]
        if not self.kernel:
            return reference.row_scores(self._with_bias(logits, bias), targets, at_target, *self.scale)
        out = at_target.new_empty(4, len(at_target))
        kernels = library.operators(logits)
        of_rows = kernels.linear_log_probs_rows if self.gather is None else kernels.linear_log_probs_shard
        of_rows(logits, bias, targets, at_target, *self.scale, self.vocab_size, *out.unbind())
        return out.unbind() if self.gather is None else merge(self.gather(out))

    def _to_gradient(
        self,
        logits: Tensor,
        bias: Tensor | None,
        rows: slice,
        at_target: Tensor,
        kept: tuple[Tensor, ...],
        of_scores: tuple[Tensor, ...],
    ) -> None:
        """Logits become their gradient."""
        targets = self.targets[rows]
        kept = tuple(x.detach() for x in kept)
        if self.kernel:
            library.operators(logits).linear_log_probs_gradient(
                logits, bias, targets, at_target, *kept, *(x.contiguous() for x in of_scores), *self.scale,
                self.vocab_size,
            )  # fmt: skip
            return
        real = self._with_bias(logits, bias)
        found = reference.row_gradient(real, targets, at_target, kept, of_scores, *self.scale)
        logits[:, : self.vocab_size] = found
        logits[:, self.vocab_size :] = 0

    def _with_bias(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        real = logits[:, : self.vocab_size]
        return real if bias is None else real + bias[: self.vocab_size]


class _InForward(torch.autograd.Function):
    """A scalar whose gradients are known when it is."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        needs = tuple(needed and call.with_gradients for needed in ctx.needs_input_grad[:3])
        loss, gradients = call.run(hidden.detach(), weight.detach(), None if bias is None else bias.detach(), needs)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        return *((x * gradient[0]).to(x.dtype) if needed else None for x, needed in wanted), None
