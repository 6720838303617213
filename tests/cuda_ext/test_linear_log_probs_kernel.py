"""The kernels of linear_log_probs, on the emulator: against fp64, torch's own error, schedules, shards, sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext import library
from cuda_ext.linear_log_probs import reference
from tests.cuda_ext.emulated import (
    DTYPES,
    draw,
    emulated,
    no_worse_than,
    rounded_once,
    same_bits,
    sparse,
    whole_numbers,
)

INF, NAN = math.inf, math.nan
# Vocabularies: less than a warp, no whole packs, a padded width, GPT-2's.
SIZES = [1, 17, 1000, 32000, 50257]
ROWS = ["log_probs", "entropy", "largest", "log_total"]


def table(rows: int, size: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """logits[M,V] whose rows begin on 16 bytes, targets[M], and the target's logit as a dot product would give it."""
    logits = torch.zeros(rows, -(-size // 8) * 8, dtype=dtype)[:, :size]
    logits.copy_(scale * draw(rows, size, seed=size))
    targets = whole_numbers(size, rows, seed=1)
    at_target = logits.gather(1, targets[:, None]).squeeze(1).float() + 0.01 * draw(rows, seed=2)
    return logits, targets, at_target


def scores(logits: Tensor, targets: Tensor, at_target: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
           cap: float = 0.0, size: int | None = None) -> list[Tensor]:  # fmt: skip
    out = [torch.full_like(at_target, 7.0) for _ in ROWS]
    size = logits.shape[1] if size is None else size
    library.operators(logits).linear_log_probs_rows(logits, bias, targets, at_target, temperature, cap, size, *out)
    return out


def gradient(logits: Tensor, targets: Tensor, at_target: Tensor, kept: list[Tensor], gradients: list[Tensor],
             bias: Tensor | None = None, temperature: float = 1.0, cap: float = 0.0,
             size: int | None = None) -> Tensor:  # fmt: skip
    """In a copy that lies as `logits` does."""
    changed = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(logits)
    entropy, largest, log_total = kept[1:]
    library.operators(logits).linear_log_probs_gradient(
        changed, bias, targets, at_target, largest, log_total, entropy, *gradients, temperature, cap,
        logits.shape[1] if size is None else size,
    )  # fmt: skip
    return changed


def true_scores(logits: Tensor, targets: Tensor, at_target: Tensor, temperature: float, cap: float) -> list[Tensor]:
    """By torch's cross_entropy and Categorical, in fp64: log_probs, entropy, log sum exp."""
    z = logits.scatter(1, targets[:, None], at_target[:, None])
    z = (cap * (z / cap).tanh() if cap else z) / temperature
    log_probs = -F.cross_entropy(z, targets, reduction="none")
    return [log_probs, torch.distributions.Categorical(logits=z).entropy(), z.logsumexp(1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("temperature", "cap"), [(1.0, 0.0), (0.7, 5.0)])
def test_emulated_rows_and_their_gradient(size: int, dtype: torch.dtype, temperature: float, cap: float) -> None:
    logits, targets, at_target = table(2, size, dtype)
    gradients = [draw(2, seed=seed) for seed in (3, 4, 5)]
    with emulated(seed=size):
        got = scores(logits, targets, at_target, None, temperature, cap)
        d_logits = gradient(logits, targets, at_target, got, gradients, None, temperature, cap)
    wide, at = logits.double().requires_grad_(), at_target.double().requires_grad_()
    exact = true_scores(wide, targets, at, temperature, cap)
    for ours, true in zip((got[0], got[1], got[2] + got[3]), exact, strict=True):
        torch.testing.assert_close(ours.double(), true.detach(), rtol=2e-6, atol=4e-6)
    d_exact, of_target = torch.autograd.grad(exact, (wide, at), [g.double() for g in gradients])
    d_exact = d_exact.scatter(1, targets[:, None], of_target[:, None])  # the target's, by the logit in its place
    rounded_once(d_logits, d_exact, sums=2.0**-19)
    assert (got[0] <= 0).all()
    assert (got[1] >= 0).all()
    assert (got[1] <= math.log(size) + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_no_worse_than_torch(dtype: torch.dtype) -> None:
    """Torch makes fp32 of the logits and log-probs of those."""
    logits, targets, _ = table(3, 1000, dtype)
    at_target = logits.gather(1, targets[:, None]).squeeze(1).float()
    ones = [torch.ones(3), torch.ones(3), torch.zeros(3)]

    def eager(leaf: Tensor) -> list[Tensor]:
        log_p = leaf.to(torch.promote_types(leaf.dtype, torch.float32)).log_softmax(1)
        both = [log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)]
        return [*both, *torch.autograd.grad(both, leaf, [x.to(log_p) for x in ones[:2]])]

    with emulated():
        got = scores(logits, targets, at_target)
        ours = [got[0], got[1], gradient(logits, targets, at_target, got, ones)]
    theirs, exact = eager(logits.clone().requires_grad_()), eager(logits.double().requires_grad_())
    for a, b, true in zip(ours, theirs, exact, strict=True):
        no_worse_than(b.detach(), a, true.detach())


def test_the_reference_is_torch_s_cross_entropy() -> None:
    """What stands between the products of the pointwise loss on a CPU."""
    logits, targets, at_target = (x.double() if x.is_floating_point() else x for x in table(5, 33, torch.float32))
    leaves = [logits.requires_grad_(), at_target.requires_grad_()]
    gradients = [draw(5, seed=seed).double() for seed in (1, 2, 3)]
    got = reference.row_scores(leaves[0], targets, leaves[1], 0.7, 4.0)
    exact = true_scores(leaves[0], targets, leaves[1], 0.7, 4.0)
    for ours, true in zip((got[0], got[1], got[2] + got[3]), exact, strict=True):
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-12)
    kept = got[2], got[3], got[1]
    found = reference.row_gradient(logits, targets, at_target, kept, tuple(gradients), 0.7, 4.0)
    d_exact, of_target = torch.autograd.grad(exact, leaves, gradients)
    torch.testing.assert_close(found, d_exact.scatter(1, targets[:, None], of_target[:, None]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_a_shift_changes_nothing_and_gradients_sum_to_zero(dtype: torch.dtype) -> None:
    logits, targets, at_target = table(2, 1000, dtype)
    logits.copy_((logits * 4).round() / 4)  # so that + 8 is exact in every dtype
    at_target = logits.gather(1, targets[:, None]).squeeze(1).float()
    with emulated():
        plain = scores(logits, targets, at_target)
        logits += 8
        shifted = scores(logits, targets, at_target + 8)
        d_logits = gradient(logits.float(), targets, at_target + 8, shifted, [*draw(2, 2), torch.zeros(2)])
    assert torch.equal(plain[0], shifted[0])
    assert torch.equal(plain[1], shifted[1])
    assert (d_logits.double().sum(1).abs() < 1e-6).all()


def test_emulated_log_probs_are_never_above_zero() -> None:
    """Rounded logits all below the target's own: a quotient of sums without it would be above 1."""
    at_target = torch.tensor([20.06, 20.06])
    logits = torch.tensor([[20.0, -30.0], [20.0, 20.0]]).bfloat16()
    with emulated():
        log_probs, entropy, *_ = scores(logits, torch.tensor([0, 0]), at_target)
    assert log_probs[0] == 0
    assert 0 <= entropy[0] < 1e-18
    assert math.isclose(log_probs[1].item(), -math.log(1 + math.exp(-0.06)), rel_tol=1e-5)


def test_emulated_what_is_not_finite() -> None:
    """Rows: -inf has no share, nothing but -inf, NaN, +inf, 1e4 (fp16), a target of no weight."""
    rows = [[1, -INF, 1, -INF], [-INF] * 4, [1, NAN, 2, 3], [1, INF, 2, 3], [1e4, 1e4, -1e4, 0], [5, 5, -INF, 0]]
    logits = torch.zeros(6, 8, dtype=torch.float16)[:, :4]
    logits.copy_(torch.tensor(rows))
    targets = torch.tensor([0, 0, 0, 0, 0, 2])
    at_target = logits.gather(1, targets[:, None]).squeeze(1).float()
    with emulated():
        got = scores(logits, targets, at_target)
        d_logits = gradient(logits, targets, at_target, got, [torch.ones(6), torch.ones(6), torch.zeros(6)])
    log_probs, entropy = got[:2]
    torch.testing.assert_close(log_probs[[0, 4]], torch.full((2,), -math.log(2)))
    torch.testing.assert_close(entropy[[0, 4]], torch.full((2,), math.log(2)))
    assert log_probs[1:4].isnan().all()
    assert entropy[1:4].isnan().all()
    assert log_probs[5] == -INF
    assert entropy[5].isfinite()
    torch.testing.assert_close(d_logits[0].float(), torch.tensor([0.5, 0, -0.5, 0]))
    torch.testing.assert_close(d_logits[4].float(), torch.tensor([0.5, -0.5, 0, 0]))
    assert d_logits[2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_bits_depend_on_no_schedule_and_no_other_row(dtype: torch.dtype) -> None:
    logits, targets, at_target = table(3, 3000, dtype)
    ones = [draw(3, seed=seed) for seed in (1, 2, 3)]

    def both() -> tuple[Tensor, ...]:
        got = scores(logits, targets, at_target)
        return (*got, gradient(logits, targets, at_target, got, ones))

    same_bits(both)
    with emulated():
        whole = both()
        alone = scores(logits[2:], targets[2:], at_target[2:])
        d_alone = gradient(logits[2:], targets[2:], at_target[2:], alone, [x[2:] for x in ones])
    for a, b in zip((*alone, d_alone), whole, strict=True):
        assert torch.equal(a[0], b[2])


def test_emulated_padding_a_bias_and_rows_that_lie_anywhere() -> None:
    logits, targets, at_target = table(4, 100, torch.bfloat16)
    bias, targets = draw(100, seed=9), targets % 77
    ones = [torch.ones(4), torch.ones(4), torch.ones(4)]
    odd = torch.empty(4, 101, dtype=torch.bfloat16)[:, 1:].copy_(logits)  # where 16 bytes cannot be moved
    with emulated():
        got, apart = (scores(x, targets, at_target, bias, size=77) for x in (logits, odd))
        plain = scores((logits[:, :77].float() + bias[:77]).contiguous(), targets, at_target)
        d_logits, d_odd = (gradient(x, targets, at_target, got, ones, bias, size=77) for x in (logits, odd))
    for a, b, c in zip(got, apart, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)
    assert (d_logits[:, 77:] == 0).all()
    assert (d_logits[:, :77] != 0).all()
    torch.testing.assert_close(d_logits, d_odd)


def test_emulated_beyond_two_to_the_31st() -> None:
    rows, size = 32769, 65536
    logits, last = sparse(rows, size, dtype=torch.bfloat16), rows - 1
    logits[last] = draw(size, dtype=torch.bfloat16)
    targets, at_target = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    at_target[last] = logits[last, 0]
    ones = [torch.ones(rows)] * 3
    with emulated(first_block=last):
        got = scores(logits, targets, at_target)
        library.operators(logits).linear_log_probs_gradient(
            logits, None, targets, at_target, got[2], got[3], got[1], *ones, 1.0, 0.0, size
        )
        small = draw(size, dtype=torch.bfloat16)[None]
        alone = scores(small, targets[:1], at_target[last:])
        d_alone = gradient(small, targets[:1], at_target[last:], alone, [x[:1] for x in ones])
    assert torch.equal(got[0][last], alone[0][0])
    assert torch.equal(logits[last], d_alone[0])
    weight, hidden = sparse(40000, size, dtype=torch.bfloat16), torch.ones(1, size, dtype=torch.bfloat16)
    weight[-1, -4:] = 2
    out = torch.empty(1)
    with emulated():
        library.operators(out).linear_log_probs_target(hidden, weight, None, torch.tensor([39999]), NAN, 40000, out)
    assert out.item() == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits": torch.ones(3, 8).double()}, "logits is float64, not float32, bfloat16 or float16"),
        ({"logits": torch.ones(24)}, r"logits \[24\] has 1 dimensions, not 2"),
        ({"logits": torch.ones(8, 3).t()}, r"logits \[3,8\] has strides 1 and 3: rows must be contiguous and apart"),
        ({"vocab_size": 9}, "vocab_size is 9, not 1 to the 8 columns of logits"),
        ({"temperature": 0.0}, "temperature is 0: it must be above 0"),
        ({"cap": -1.0}, "soft_cap is -1: it must be above 0, or 0 for none"),
        ({"bias": torch.ones(7)}, r"bias \[7\] has 7 elements, not 8"),
        ({"targets": torch.ones(3)}, "targets is float32, not int64"),
        ({"at_target": torch.ones(2)}, r"target_logits \[2\] has 2 elements, not 3"),
    ],
)
def test_emulated_what_does_not_fit_is_named(change: dict[str, object], says: str) -> None:
    arguments = {
        "logits": torch.ones(3, 8), "bias": None, "targets": torch.zeros(3, dtype=torch.int64),
        "at_target": torch.ones(3), "temperature": 1.0, "cap": 0.0, "vocab_size": 8,
    } | change  # fmt: skip
    out = [torch.empty(3) for _ in range(4)]
    with emulated(), pytest.raises(RuntimeError, match="linear_log_probs_rows: " + says):
        library.operators(torch.ones(1)).linear_log_probs_rows(*arguments.values(), *out)
