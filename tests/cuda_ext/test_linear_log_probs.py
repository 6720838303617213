"""Log-probabilities of labels: by hand, against torch's cross_entropy and Categorical, in chunks, padded vocabulary."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext.linear_log_probs import reference
from cuda_ext.linear_log_probs.op import linear_log_probs, log_softmax


def draw(
    rows: int, size: int, vocabulary: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(rows, size), torch.randn(vocabulary, size), torch.randn(vocabulary)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return leaves[0], leaves[1], torch.randint(0, vocabulary, (rows,)), leaves[2]


def test_two_labels_by_hand() -> None:
    """Logits (0, ln 3) at temperature 1: probabilities 1/4 and 3/4. At temperature 1/2: (0, ln 9): 1/10 and 9/10."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]])
    targets = torch.tensor([0, 1])
    log_probs, entropy = linear_log_probs(hidden, weight, targets, with_entropy=True)
    torch.testing.assert_close(log_probs.exp(), torch.tensor([0.25, 0.75]))
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.full((2,), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)))
    log_probs, entropy = linear_log_probs(hidden, weight, targets, temperature=0.5)
    torch.testing.assert_close(log_probs.exp(), torch.tensor([0.1, 0.9]))
    assert entropy is None


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_cross_entropy_and_categorical_with_gradients(
    chunked: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(reference, "_CHUNK_LOGITS", 8 * 11)
    hidden, weight, targets, bias = draw(29, 5, 11)
    ours = linear_log_probs(hidden, weight, targets, bias, temperature, with_entropy=True)
    logits = F.linear(hidden, weight, bias) / temperature
    theirs = (
        -F.cross_entropy(logits, targets, reduction="none"),
        torch.distributions.Categorical(logits=logits).entropy(),
    )
    a, b = torch.randn(2, 29).double()
    results = []
    for log_probs, entropy in (ours, theirs):
        assert entropy is not None
        grads = torch.autograd.grad((a * log_probs + b * entropy).sum(), (hidden, weight, bias))
        results.append((log_probs, entropy, *grads))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_padded_rows_of_the_vocabulary_have_no_probability_and_no_gradient() -> None:
    hidden, weight, targets, bias = draw(6, 4, 8)
    targets = targets % 5
    padded, _ = linear_log_probs(hidden, weight, targets, bias, vocab_size=5)
    plain, _ = linear_log_probs(hidden, weight[:5], targets, bias[:5])
    assert torch.equal(padded, plain)
    (grad,) = torch.autograd.grad(padded.sum(), weight)
    assert (grad[5:] == 0).all()
    assert (grad[:5] != 0).any()


def test_bf16_is_accumulated_in_fp32() -> None:
    """Products of bf16 numbers are exact in fp32; what is left is the fp32 error of sums and softmax. Rounding the
    logits to bf16 would be off by 0.1 here."""
    hidden, weight, targets, _ = draw(64, 128, 200, torch.bfloat16)
    log_probs, _ = linear_log_probs(hidden, weight, targets)
    exact = F.log_softmax(hidden.double() @ weight.double().T, -1)[torch.arange(64), targets]
    assert log_probs.dtype == torch.float32
    assert (log_probs - exact).abs().max() < 1e-4


def test_chunks_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = draw(64, 16, 100, torch.float32)
    whole, _ = linear_log_probs(hidden, weight, targets)
    monkeypatch.setattr(reference, "_CHUNK_LOGITS", 16 * 100)
    parts, _ = linear_log_probs(hidden, weight, targets)
    assert torch.equal(whole, parts)


def test_log_softmax_of_logits_has_the_same_bits() -> None:
    hidden, weight, targets, _ = draw(16, 16, 100, torch.float32)
    log_probs, _ = linear_log_probs(hidden, weight, targets, temperature=0.9)
    table = log_softmax(F.linear(hidden, weight), temperature=0.9)
    assert torch.equal(table.gather(1, targets.unsqueeze(1)).squeeze(1), log_probs)


def test_no_rows_is_no_error_and_keeps_the_graph() -> None:
    hidden, weight, targets, _ = draw(0, 4, 8)
    log_probs, _ = linear_log_probs(hidden, weight, targets)
    log_probs.sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_finite_differences() -> None:
    hidden, weight, targets, bias = draw(3, 2, 4)

    def both(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        log_probs, entropy = linear_log_probs(h, w, targets, b, 0.8, with_entropy=True)
        assert entropy is not None
        return torch.stack((log_probs, entropy))

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))
