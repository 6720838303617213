"""Attention: numbers by hand, torch's own, a loop over positions, and bits that do not depend on the batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext.attention import reference
from cuda_ext.attention.op import attention
from framework.core.runtime import num_threads


def draw(batch: int, queries: int, keys: int, heads: int, groups: int, size: int, **kind: object) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, queries, heads, size), (batch, keys, groups, size), (batch, keys, groups, size)]
    return [torch.randn(shape, **kind) for shape in shapes]  # type: ignore[call-overload]


@pytest.mark.parametrize("strict", [False, True])
def test_two_tokens_by_hand(strict: bool) -> None:
    """Scores of the second query: (0, ln 3) after scaling, so weights 1/4 and 3/4; the first sees itself alone."""
    q = torch.tensor([[[[1.0, 0.0]], [[0.0, math.log(3) * math.sqrt(2)]]]])
    k = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    v = torch.tensor([[[[4.0, 0.0]], [[0.0, 4.0]]]])
    torch.testing.assert_close(attention(q, k, v, causal=True, strict=strict), torch.tensor([[[[4.0, 0]], [[1.0, 3]]]]))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_equals_torch_with_repeated_heads_and_its_gradients(
    strict: bool, masked: bool, heads: int, groups: int
) -> None:
    inputs = draw(2, 5, 5, heads, groups, 6, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 1, 5, 5) < 0.6) | torch.eye(5, dtype=torch.bool) if masked else None
    ours = attention(*inputs, mask=mask, causal=True, strict=strict)
    seen = torch.ones(5, 5, dtype=torch.bool).tril() if mask is None else mask & torch.ones(5, 5).tril().bool()
    q, k, v = (x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in inputs)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strict", [False, True])
def test_capped_scores_are_those_of_gemma_2(strict: bool) -> None:
    """Against transformers' own eager attention; and a score of 3 capped at 2 by hand."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    class Module(torch.nn.Module):
        num_key_value_groups = 2

    q, k, v = draw(2, 5, 5, 4, 2, 8, dtype=torch.float32)
    q = 3 * q
    seen = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    added = torch.zeros(2, 1, 5, 5).masked_fill(~seen, float("-inf"))
    theirs, _ = eager_attention_forward(
        Module(), *(x.transpose(1, 2) for x in (q, k, v)), added, scaling=8**-0.5, softcap=2.0
    )
    ours = attention(q, k, v, causal=True, cap=2.0, strict=strict)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - attention(q, k, v, causal=True, strict=strict)).abs().max() > 0.05
    one = torch.ones(1, 1, 1, 1)
    two = torch.tensor([[[[3.0]], [[0.0]]]])
    mixed = attention(one, two, torch.tensor([[[[1.0]], [[0.0]]]]), cap=2.0, scale=1.0)
    assert float(mixed) == pytest.approx(1 / (1 + math.exp(-2 * math.tanh(1.5))))


def test_reference_equals_a_loop_over_queries() -> None:
    q, k, v = draw(2, 4, 7, 2, 1, 3, dtype=torch.float64)
    mask = torch.rand(2, 1, 4, 7) < 0.7
    mask[..., 0] = True
    ours = reference.attention(q, k, v, mask=mask, scale=0.3)
    for b in range(2):
        for t in range(4):
            for head in range(2):
                seen = [s for s in range(7) if mask[b, 0, t, s]]
                weights = [math.exp(0.3 * float(q[b, t, head] @ k[b, s, 0])) for s in seen]
                y = sum(w * v[b, s, 0] for w, s in zip(weights, seen, strict=True)) / sum(weights)
                torch.testing.assert_close(ours[b, t, head], y, rtol=0, atol=1e-12)


def test_gradients_of_the_reference_by_finite_differences() -> None:
    inputs = draw(1, 3, 3, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, causal=True, strict=True), inputs)


def test_the_softmax_is_taken_in_fp32_for_bf16() -> None:
    q, k, v = (x.bfloat16() for x in draw(1, 64, 64, 1, 1, 8))
    exact = reference.attention(q.double(), k.double(), v.double(), causal=True)
    error = (reference.attention(q, k, v, causal=True).double() - exact).abs().max()
    assert error < 0.03
    assert reference.attention(q, k, v, causal=True).dtype == torch.bfloat16


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("length", "size", "heads", "groups"), [(13, 8, 2, 1), (40, 24, 4, 4), (104, 64, 4, 2)])
def test_strict_bits_of_a_query_do_not_depend_on_the_batch(
    threads: int, length: int, size: int, heads: int, groups: int
) -> None:
    q, k, v = draw(5, length, length, heads, groups, size)
    padded = -(-length // 8) * 8
    cached_k, cached_v = (F.pad(x, (0, 0, 0, 0, 0, padded - length), value=7.0) for x in (k, v))  # stale entries
    with num_threads(threads):
        whole = attention(q, k, v, causal=True, strict=True)
        for rows in ([0], [3, 1], [4, 2, 0]):
            for first, count in ((0, 1), (length - 1, 1), (2, 5)):
                mask = torch.arange(padded) <= torch.arange(first, first + count).unsqueeze(1)
                part = q[rows, first : first + count]
                y = attention(part, cached_k[rows], cached_v[rows], mask=mask[None, None], strict=True)
                assert torch.equal(y, whole[rows, first : first + count])


@pytest.mark.parametrize("strict", [False, True])
def test_padding_leaves_gradients_finite(strict: bool) -> None:
    inputs = draw(1, 3, 3, 1, 1, 8, requires_grad=True)
    attention(*inputs, causal=True, strict=strict).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs if x.grad is not None)
    assert all(x.grad is not None for x in inputs)
