"""linear_log_probs by its kernels, hidden states in, on the emulator: chunks, shards, gradients, what it chooses."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext.linear_log_probs import op
from tests.cuda_ext.emulated import DTYPES, draw, emulated, no_worse_than, whole_numbers

SIMPLE = ("test_schema", "test_faketensor")  # of operators that no gradient goes through


def states(rows: int, size: int, vocabulary: int, dtype: torch.dtype, steps: int = 0) -> list[Tensor]:
    """hidden, weight, bias, targets; with `steps`, multiples of 1/steps, of which products and sums are exact."""
    leaves = [draw(rows, size, seed=1), draw(vocabulary, size, seed=2), draw(vocabulary, seed=3)]
    if steps:
        leaves = [(x * steps).round() / steps for x in leaves]
    targets = whole_numbers(vocabulary, rows, seed=4)
    return [leaves[0].to(dtype), leaves[1].to(dtype), leaves[2], targets]


def both_ways(values: list[Tensor], score: Callable[..., tuple[Tensor, ...]], chunk: int = 4) -> list[Tensor]:
    """log_probs, entropy, log sum exp, and the gradients of hidden, weight and bias."""
    hidden, weight, bias, targets = values
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    out = score(*leaves, targets, 0.8, 6.0, len(weight) - 3, chunk)[:3]
    gradients = [draw(len(hidden), seed=seed).to(out[0].dtype) for seed in (5, 6, 7)]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, gradients)]


def eager(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, temperature: float, cap: float, size: int,
          _: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Torch's own, in the inputs' dtype up to the logits."""
    logits = F.linear(hidden, weight[:size], bias[:size].to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = cap * (logits / cap).tanh() / temperature
    table = z.log_softmax(1)
    return table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(1), z.logsumexp(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 11, 64])
def test_emulated_from_hidden_states_both_ways(rows: int, dtype: torch.dtype) -> None:
    values = states(rows, 24, 50, dtype)
    values[3] = values[3] % 47
    with emulated():
        ours = both_ways(values, op.fused)
    theirs = both_ways(values, eager)
    exact = both_ways([x.double() if x.is_floating_point() else x for x in values], eager)
    assert ours[3].dtype == ours[4].dtype == dtype
    assert (ours[4][47:] == 0).all()
    for a, b, true in zip(ours, theirs, exact, strict=True):
        torch.testing.assert_close(a.double(), true, rtol=0, atol=(1e-5 if dtype == torch.float32 else 0.03))
        if rows == 64:  # of few numbers, whose rounding does more harm is chance
            no_worse_than(b, a, true, times=1.3)
    if dtype != torch.float32:
        no_worse_than(theirs[0], ours[0], exact[0], times=0.5)  # the target's logit is not rounded


def test_emulated_the_target_s_logit_is_not_rounded() -> None:
    """Logits near 20 in bf16 are multiples of 1/8: log-probs of two close policies would jump by that."""
    hidden = torch.full((2, 8), 1.6015625).bfloat16()
    weight = torch.stack([torch.full((8,), 1.5), torch.full((8,), -4.0)]).bfloat16()
    hidden[1, 0] += 0.0078125
    with emulated():
        log_probs, _, lse, _ = op.fused(hidden, weight, None, torch.tensor([0, 0]), 1.0, 0.0, 2, 8)
    exact = (hidden.double() @ weight.double().T)[:, 0]
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=2e-6)
    assert (log_probs == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulated_chunks_and_other_rows_leave_the_bits(dtype: torch.dtype) -> None:
    """Of numbers whose products and sums are exact, so that the CPU's GEMM, whatever it does, does the same."""
    hidden, weight, bias, targets = states(13, 16, 40, dtype, steps=4)

    def rows(first: int, end: int, chunk: int) -> tuple[Tensor, ...]:
        return op.fused(hidden[first:end], weight, bias, targets[first:end], 1.0, 0.0, 40, chunk)

    with emulated():
        whole = rows(0, 13, 16)
        for chunk in (1, 5, 64):
            for a, b in zip(rows(0, 13, chunk), whole, strict=True):
                assert torch.equal(a, b)
        for a, b in zip(rows(9, 12, 16), whole, strict=True):
            assert torch.equal(a, b[..., 9:12])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_emulated_shards_of_the_vocabulary_are_the_whole(count: int) -> None:
    hidden, weight, bias, targets = states(7, 16, 101, torch.float32)
    gradients = [draw(7, seed=seed) for seed in (5, 6, 7)]
    parts = [torch.arange(101).chunk(count)[n] for n in range(count)]
    with emulated():
        whole = op.fused(hidden, weight, bias, targets, 0.8, 6.0, 101, 4)
        d_whole = op.fused_backward(
            hidden, weight, bias, targets, whole[1], whole[3], gradients, 0.8, 6.0, 101, 4, True, True
        )
        shards, found = [], []
        for part in parts:
            cut = weight[part], bias[part], targets - part[0]
            shards.append(op.fused_shard(hidden, *cut, 0.8, 6.0, len(part), 4))
        log_probs, entropy, largest, log_total = op.merge(torch.stack([shard[:4] for shard in shards]))
        for part, shard in zip(parts, shards, strict=True):
            cut, kept = (weight[part], bias[part], targets - part[0]), torch.stack([largest, log_total, shard[4]])
            words = 0.8, 6.0, len(part), 4, True, True
            found.append(op.fused_backward(hidden, *cut, entropy, kept, gradients, *words))
    for a, b in zip((log_probs, entropy, largest + log_total), whole[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(sum(x[0] for x in found), d_whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([x[1] for x in found]), d_whole[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([x[2] for x in found]), d_whole[2], rtol=1e-5, atol=1e-5)


def test_emulated_the_public_functions_and_what_they_choose() -> None:
    hidden, weight, bias, targets = states(5, 16, 30, torch.float32)
    plain = op.linear_scores(hidden, weight, targets, bias, 0.7, 29, 5.0)
    first = op.linear_log_probs(hidden, weight, targets, bias, 0.7, 29, True, 5.0)
    with emulated():
        ours = op.linear_scores(hidden, weight, targets, bias, 0.7, 29, 5.0)
        both = op.linear_log_probs(hidden, weight, targets, bias, 0.7, 29, True, 5.0)
        strict = op.linear_log_probs(hidden, weight, targets, bias, 0.7, 29, True, 5.0, strict=True)
        none = op.linear_log_probs(hidden[:0], weight, targets[:0])
        mixed, _ = op.linear_log_probs(hidden.bfloat16(), weight, targets)
        with torch.autocast("cpu", torch.bfloat16):
            cast, _ = op.linear_log_probs(hidden, weight, targets)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    for a, b, c, d in zip(ours, both, strict, first, strict=False):
        assert b is not None
        assert c is not None
        assert d is not None
        assert torch.equal(a, b)
        assert torch.equal(c, d)
    assert none[0].shape == (0,)
    assert none[1] is None
    for x, loose in ((mixed, 0.05), (cast, 0.1)):
        torch.testing.assert_close(x, op.linear_log_probs(hidden, weight, targets)[0], rtol=0, atol=loose)


def test_emulated_a_target_outside_the_vocabulary_is_not_a_number() -> None:
    hidden, weight, *_ = states(3, 8, 10, torch.float32)
    with emulated():
        log_probs, entropy = op.linear_log_probs(hidden, weight, torch.tensor([9, 10, -100]), with_entropy=True)
    assert log_probs.isnan().tolist() == [False, True, True]
    assert entropy is not None
    assert entropy.isfinite().all()


def test_emulated_frozen_weights_cost_no_gradient() -> None:
    hidden, weight, bias, targets = states(3, 8, 10, torch.float32)
    with emulated():
        log_probs, *_ = op.fused(hidden.requires_grad_(), weight, bias, targets, 1.0, 0.0, 10, 8)
        log_probs.sum().backward()
        leaf, kept = hidden.detach(), (torch.zeros(3), torch.zeros(3, 3), [torch.ones(3)] * 3)
        found = op.fused_backward(leaf, weight, bias, targets, *kept, 1.0, 0.0, 10, 8, True, False)
    assert hidden.grad is not None
    assert found[1].numel() == 0


def test_emulated_torch_finds_nothing_wrong_with_the_operators() -> None:
    hidden, weight, bias, targets = states(3, 8, 10, torch.float32)
    words = (1.0, 0.0, 10, 4)
    with emulated():
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        torch.library.opcheck(op.fused, (*leaves, targets, *words))
        torch.library.opcheck(op.fused_shard, (hidden, weight, bias, targets, *words), test_utils=SIMPLE)
        out = op.fused(hidden, weight, bias, targets, *words)
        gradients = [torch.ones(3)] * 3
        arguments = (hidden, weight, bias, targets, out[1], out[3], gradients, *words, True, True)
        torch.library.opcheck(op.fused_backward, arguments, test_utils=SIMPLE)


def test_emulated_it_stays_in_a_compiled_graph() -> None:
    values = states(3, 8, 10, torch.float32)

    def scored(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *_: object) -> tuple[Tensor, ...]:
        return op.linear_scores(hidden * 2, weight, targets, bias)

    with emulated():
        compiled = torch.compile(scored, fullgraph=True, backend="aot_eager")
        for a, b in zip(both_ways(values, compiled), both_ways(values, scored), strict=True):
            assert torch.equal(a, b)


def test_emulated_inputs_that_do_not_belong_together_are_named() -> None:
    targets = torch.zeros(3, dtype=torch.int64)
    with emulated():
        with pytest.raises(ValueError, match=r"hidden \[3, 8\] and weight \[5, 9\] must be \[M,D\] and \[V,D\]"):
            op.linear_log_probs(torch.ones(3, 8), torch.ones(5, 9), targets)
        with pytest.raises(ValueError, match=r"hidden is torch.float32 and weight torch.float16: one dtype"):
            op.fused(torch.ones(3, 8), torch.ones(5, 8).half(), None, targets, 1.0, 0.0, 5, 8)
        with pytest.raises(RuntimeError, match="vocab_size is 6, not 1 to the 5 rows of weight"):
            op.linear_log_probs(torch.ones(3, 8), torch.ones(5, 8), targets, vocab_size=6)
