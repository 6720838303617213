"""Log-probabilities (and entropy) of labels straight from hidden states, without keeping the logits.

With the kernel, rows go in chunks of one size whatever their number, the last one filled up with zeros, so that every
matrix product has one shape and a row's bits do not depend on how many there are. A chunk's logits stand in one buffer
in the dtype of the inputs, are read once, and are computed again in the backward pass: 8 M D V operations.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext import dispatch, library
from cuda_ext.linear_log_probs import reference

Gather = Callable[[Tensor], Tensor]  # x of this shard of the vocabulary -> [S, ...], that of each
_MOST_ROWS, _MOST_LOGITS = 2048, 1 << 28  # of a chunk: 512 MiB in bf16
_COLUMNS = 64  # a buffer's rows begin on as many bytes as any GEMM wants


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    with_entropy: bool = False,
    soft_cap: float = 0.0,
    strict: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `reference.linear_log_probs`. hidden[M,D], weight[V,D], targets[M] -> (log_probs[M], entropy[M] or None).

    `strict`: the bits that `log_softmax` gives of logits, which a kernel's are not. The kernel gives NaN where a target
    is none of the vocabulary; the reference raises IndexError.
    """
    if not uses_kernel(hidden, weight, strict):
        return reference.linear_log_probs(
            hidden, weight, targets, bias, temperature, vocab_size, with_entropy, soft_cap
        )
    log_probs, entropy, _ = _fused(hidden, weight, targets, bias, temperature, vocab_size, soft_cap)
    return log_probs, entropy if with_entropy else None


def linear_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_scores`: (log_probs, entropy, log sum exp), all [M] and differentiable."""
    if not uses_kernel(hidden, weight):
        return reference.linear_scores(hidden, weight, targets, bias, temperature, vocab_size, soft_cap)
    return _fused(hidden, weight, targets, bias, temperature, vocab_size, soft_cap)


def shard_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    gather: Gather,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    soft_cap: float = 0.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(log_probs, entropy), both [M], of a vocabulary of which weight[v,D] and bias[v] are a shard; targets[M] count
    from its first row. The kernel's alone (`uses_kernel`); `gather` brings together four numbers a row. Gradients of
    weight and bias are this shard's; hidden's is the summand that this shard gives. `chunk`: rows, `rows_of` the
    shard where not given."""
    hidden, weight = of_one_dtype(hidden, weight)
    bias = None if bias is None else bias.float()
    words = temperature, soft_cap, len(weight), chunk or rows_of(len(weight))
    log_probs, entropy = _OfShard.apply(hidden, weight, bias, targets, gather, words)
    return log_probs, entropy


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """See `reference.log_softmax`. logits[..., V] -> [..., V], the bits that `linear_log_probs` gives."""
    return reference.log_softmax(logits, temperature)


def uses_kernel(hidden: Tensor, weight: Tensor, strict: bool = False) -> bool:
    """Whether the kernel runs for these; the log says so once."""
    if strict:
        dispatch.announce("linear_log_probs", dispatch.STRICT)
        return False
    return dispatch.choose("linear_log_probs", hidden, weight).kernel


def rows_of(vocabulary: int) -> int:
    """Rows of a chunk: of this vocabulary alone."""
    return max(128, min(_MOST_ROWS, _MOST_LOGITS // vocabulary // 128 * 128))


def of_one_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both as a matrix product takes them: autocast's dtype within it, else what holds both."""
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype)


def _fused(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    vocab_size: int | None,
    soft_cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = of_one_dtype(hidden, weight)
    bias = None if bias is None else bias.float()
    size, chunk = len(weight) if vocab_size is None else vocab_size, rows_of(len(weight))
    log_probs, entropy, lse, _ = fused(hidden, weight, bias, targets, temperature, soft_cap, size, chunk)
    return log_probs, entropy, lse


# --- the operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("cuda_ext::linear_log_probs", mutates_args=())
def fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    soft_cap: float,
    vocab_size: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel. hidden[M,D] and weight[V,D] of one dtype, bias[V] fp32, targets[M] -> (log_probs, entropy,
    log sum exp, each [M], and [3,M] for the way back: the largest z, log sum exp(z - largest), the target's logit)."""
    _check(hidden, weight, chunk)
    log_probs, entropy, _, kept = _like(hidden, weight, bias, targets, temperature, soft_cap, vocab_size, chunk)
    largest, log_total, at_target = kept
    kernels = library.operators(hidden)
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    kernels.linear_log_probs_target(hidden, weight, bias, targets, float("nan"), vocab_size, at_target)
    for rows, _, logits in chunks(hidden, weight, chunk):
        kernels.linear_log_probs_rows(
            logits, bias, targets[rows], at_target[rows], temperature, soft_cap, vocab_size,
            log_probs[rows], entropy[rows], largest[rows], log_total[rows],
        )  # fmt: skip
    return log_probs, entropy, largest + log_total, kept


@torch.library.custom_op("cuda_ext::linear_log_probs_backward", mutates_args=())
def fused_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    entropy: Tensor,
    kept: Tensor,
    gradients: list[Tensor],
    temperature: float,
    soft_cap: float,
    vocab_size: int,
    chunk: int,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias from those of log_probs, entropy and log sum exp; empty where not asked
    for. `entropy` and `kept` may be those of a whole vocabulary of which weight[v,D] is a shard."""
    kernels = library.operators(hidden)
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    total = Gradients(hidden, weight, bias, for_hidden, for_weight)
    for rows, padded, logits in chunks(hidden, weight, chunk):
        g, h, l = (gradient[rows].contiguous() for gradient in gradients)  # noqa: E741
        largest, log_total, at_target = kept[:, rows].unbind()
        kernels.linear_log_probs_gradient(
            logits, bias, targets[rows], at_target, largest, log_total, entropy[rows], g, h, l,
            temperature, soft_cap, vocab_size,
        )  # fmt: skip
        total.add(rows, padded, logits)
    return total.result()


@torch.library.custom_op("cuda_ext::linear_log_probs_shard", mutates_args=())
def fused_shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    soft_cap: float,
    vocab_size: int,
    chunk: int,
) -> Tensor:
    """What a shard weight[v,D] of the vocabulary knows of each row: [5,M], the largest z, the sum of exp(z - largest),
    that of exp(z - largest) (z - largest), and z and logit of the target: 0 if it is none of this shard's. `merge`
    joins the first four of all shards. targets[M] count from the shard's first row. Not differentiable by itself."""
    _check(hidden, weight, chunk)
    out = _like_shard(hidden, weight, bias, targets, temperature, soft_cap, vocab_size, chunk)
    kernels = library.operators(hidden)
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    kernels.linear_log_probs_target(hidden, weight, bias, targets, 0.0, vocab_size, out[4])
    for rows, _, logits in chunks(hidden, weight, chunk):
        kernels.linear_log_probs_shard(
            logits, bias, targets[rows], out[4, rows], temperature, soft_cap, vocab_size, *out[:4, rows].unbind()
        )
    return out


def merge(shards: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_probs, entropy, largest z, log sum exp(z - largest)), all [M], from [S,4,M] of S shards."""
    largest, total, moment, target = shards.unbind(1)
    top = largest.amax(0)
    shift = torch.where(largest == -torch.inf, 0, largest - top)
    factor = (largest - top).exp()
    whole = (factor * total).sum(0)
    log_whole = whole.log()
    below = (factor * (moment + shift * total)).sum(0)
    return target.sum(0) - top - log_whole, log_whole - below / whole, top, log_whole


class _OfShard(torch.autograd.Function):
    """`fused_shard` and `fused_backward`, with what other shards know between them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        gather: Gather,
        words: tuple[float, float, int, int],
    ) -> tuple[Tensor, Tensor]:
        shard = fused_shard(hidden, weight, bias, targets, *words)
        log_probs, entropy, largest, log_total = merge(gather(shard[:4]))
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, torch.stack([largest, log_total, shard[4]]))
        ctx.words = words
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        three = [*gradients, torch.zeros_like(gradients[0])]
        found = fused_backward(*ctx.saved_tensors, three, *ctx.words, *needed[:2])
        return *(x if need else None for x, need in zip(found, needed, strict=True)), None, None, None


# --- chunks ----------------------------------------------------------------------------------------------------------


def chunks(hidden: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each chunk: its rows, hidden[chunk,D] with zeros behind the last, and the rows' logits[m,V], which stand in
    one buffer for all. Every product is of one shape."""
    size = len(weight)
    buffer = weight.new_empty(chunk, -(-size // _COLUMNS) * _COLUMNS)[:, :size]
    for start in range(0, len(hidden), chunk):
        rows = slice(start, min(start + chunk, len(hidden)))
        padded = F.pad(hidden[rows], (0, 0, 0, chunk - (rows.stop - start)))
        torch.mm(padded, weight.t(), out=buffer)
        buffer[rows.stop - start :] = 0  # where the products of a chunk's gradient look for zeros
        yield rows, padded, buffer[: rows.stop - start]


class Gradients:
    """Sums over chunks: hidden's in its dtype, row by row; weight's and bias's in at least fp32, rounded at the end."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, for_hidden: bool, for_weight: bool):
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.kept = weight
        self.hidden = hidden.new_empty(hidden.shape if for_hidden else (0,))
        self.weight = weight.new_zeros(weight.shape if for_weight else (0,), dtype=wide)
        self.bias = weight.new_zeros(0 if bias is None else len(bias), dtype=wide)
        self.for_hidden, self.for_weight, self.for_bias = for_hidden, for_weight, bias is not None

    def add(self, rows: slice, padded: Tensor, gradient: Tensor) -> None:
        """Of one chunk: its rows, hidden[chunk,D] and d logits[m,V], with zeros behind them up to `chunk`."""
        whole = gradient.as_strided((len(padded), gradient.shape[1]), gradient.stride())
        if self.for_hidden:
            self.hidden[rows] = torch.mm(whole, self.kept)[: len(gradient)]
        if self.for_weight:
            _add_product(self.weight, whole.t(), padded)
        if self.for_bias:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias."""
        return self.hidden, self.weight.to(self.kept.dtype), self.bias


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, summed in total's dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _check(hidden: Tensor, weight: Tensor, chunk: int) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {[*hidden.shape]} and weight {[*weight.shape]} must be [M,D] and [V,D]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: one dtype is needed")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least one row is needed")


# --- what torch wants to know of the operators ---------------------------------------------------------------------


@fused.register_fake
def _like(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    soft_cap: float,
    vocab_size: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_probs, entropy, lse = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
    return log_probs, entropy, lse, hidden.new_empty(3, len(hidden), dtype=torch.float32)


@fused_shard.register_fake
def _like_shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    soft_cap: float,
    vocab_size: int,
    chunk: int,
) -> Tensor:
    return hidden.new_empty(5, len(hidden), dtype=torch.float32)


@fused_backward.register_fake
def _like_inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    entropy: Tensor,
    kept: Tensor,
    gradients: list[Tensor],
    temperature: float,
    soft_cap: float,
    vocab_size: int,
    chunk: int,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_hidden = hidden.new_empty(hidden.shape if for_hidden else (0,))
    of_weight = weight.new_empty(weight.shape if for_weight else (0,))
    return of_hidden, of_weight, weight.new_empty(0 if bias is None else len(bias), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *ctx.words = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, output[1], output[3])
    ctx.mark_non_differentiable(output[3])


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
    found = fused_backward(*ctx.saved_tensors, list(gradients[:3]), *ctx.words, for_hidden, for_weight)
    wanted = (x if needed else None for x, needed in zip(found, (for_hidden, for_weight, for_bias), strict=True))
    return *wanted, *(None,) * 5


fused.register_autograd(_backward, setup_context=_keep)
