"""The draw against the exact distribution, kept sets against transformers', and the law Sampling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cuda_ext.sampling import reference
from cuda_ext.sampling.reference import draw, token_log_probs
from framework.core.errors import NonFiniteError
from framework.generation.config import SamplingConfig
from framework.generation.sampling import (
    require_finite,
    sample,
    sampling_uniforms,
)

LARGEST = 1 - 2.0**-53  # the largest double below 1


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def token_weights(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    return reference.token_weights(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


def test_inverse_cdf_by_hand() -> None:
    weights = torch.tensor([[1, 0, 3, 0]]).expand(6, 4)  # shares: [0, 0.25) is token 0, [0.25, 1) is token 2
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.999999999, LARGEST], dtype=torch.float64)
    assert draw(weights, uniforms).tolist() == [0, 0, 2, 2, 2, 2]


def test_a_distribution_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/4 and 3/4; at temperature 1/2: 1/10 and 9/10
    uniforms = torch.tensor([0.2], dtype=torch.float64)
    tokens, log_probs = sample(logits, uniforms, SamplingConfig())
    assert tokens.tolist() == [0]
    assert log_probs.item() == pytest.approx(math.log(0.25), abs=1e-6)
    tokens, log_probs = sample(logits, uniforms, SamplingConfig(temperature=0.5))
    assert tokens.tolist() == [1]
    assert log_probs.item() == pytest.approx(math.log(0.9), abs=1e-6)
    tokens, log_probs = sample(logits, uniforms, SamplingConfig(temperature=0.0))
    assert tokens.tolist() == [1]
    assert log_probs.item() == pytest.approx(math.log(0.75), abs=1e-6)


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(temperature=1.7), SamplingConfig(temperature=0.7, top_k=5, top_p=0.9)]
)
def test_frequencies_are_the_exact_distribution(sampling: SamplingConfig) -> None:
    draws, logits = 40_000, random_logits(1, 12, seed=1, scale=1.0)
    scores = _warped(logits, sampling)
    expected = torch.softmax(scores.double(), -1)[0] * draws
    row = torch.arange(draws)
    uniforms = sampling_uniforms(3, row, torch.tensor(0), torch.tensor(7))
    tokens, _ = sample(logits.expand(draws, -1), uniforms, sampling)
    counts = torch.bincount(tokens, minlength=12).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)  # mean and standard deviation of chi-square: d, sqrt(2 d)


@pytest.mark.parametrize("top_k", [0, 1, 7, 999])
@pytest.mark.parametrize("top_p", [1.0, 0.85, 0.05])
@pytest.mark.parametrize("min_p", [0.0, 0.03, 1.0])
def test_kept_sets_are_those_of_transformers(top_k: int, top_p: float, min_p: float) -> None:
    sampling = SamplingConfig(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(16, 50, seed=2)
    assert torch.equal(token_weights(logits, sampling) > 0, torch.isfinite(_warped(logits, sampling)))


def _warped(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores


def test_filters_move_the_draw_but_not_the_log_prob() -> None:
    logits = random_logits(8, 20)
    sampling = SamplingConfig(temperature=0.9, top_k=3)
    tokens, log_probs = sample(logits, torch.linspace(0, 0.9, 8, dtype=torch.float64), sampling)
    full = torch.log_softmax(logits / 0.9, -1).gather(-1, tokens[:, None])[:, 0]
    assert torch.equal(log_probs, full)
    assert torch.equal(log_probs, token_log_probs(logits, tokens, 0.9))


def test_ties_are_broken_without_invention() -> None:
    logits = torch.zeros(1, 5)
    assert (token_weights(logits, SamplingConfig(top_k=2)) > 0).sum() == 5  # all five tie with the second largest
    assert (token_weights(logits, SamplingConfig(top_p=0.5)) > 0).tolist() == [[True, True, True, False, False]]
    assert sample(logits, torch.zeros(1, dtype=torch.float64), SamplingConfig(temperature=0.0))[0].tolist() == [0]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    vocab=st.integers(1, 70),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    uniform=st.floats(0.0, LARGEST),
)
def test_a_token_depends_on_its_row_alone_and_is_never_filtered(
    seed: int, vocab: int, top_k: int, top_p: float, min_p: float, uniform: float
) -> None:
    sampling = SamplingConfig(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(9, vocab, seed, scale=6.0)
    uniforms = torch.full((9,), uniform, dtype=torch.float64)
    tokens, log_probs = sample(logits, uniforms, sampling)
    weights = token_weights(logits, sampling)
    assert (weights.gather(-1, tokens[:, None]) > 0).all()
    for row in (0, 4, 8):
        alone, log_prob = sample(logits[row : row + 1], uniforms[:1], sampling)
        assert torch.equal(alone, tokens[row : row + 1])
        assert torch.equal(log_prob, log_probs[row : row + 1])


def test_uniforms_are_a_pure_function_of_their_coordinates() -> None:
    row, sample_number, position = torch.tensor([5, 6, 5]), torch.tensor([0, 0, 1]), torch.tensor([9, 9, 9])
    together = sampling_uniforms(1, row, sample_number, position)
    for i in range(3):
        assert torch.equal(sampling_uniforms(1, row[i : i + 1], sample_number[i], position[i]), together[i : i + 1])
    assert len(set(together.tolist()) | set(sampling_uniforms(2, row, sample_number, position).tolist())) == 6


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_logits_without_a_distribution_are_refused(poison: float, temperature: float) -> None:
    logits = random_logits(3, 6)
    logits[1, 2] = poison
    sampling = SamplingConfig(temperature=temperature, top_p=0.9, min_p=0.1)
    tokens, log_probs = sample(logits, torch.full((3,), 0.5, dtype=torch.float64), sampling)
    assert ((tokens >= 0) & (tokens < 6)).all()
    with pytest.raises(NonFiniteError, match="1 of 3 rows"):
        require_finite(log_probs)


def test_masked_logits_are_no_error_and_never_drawn() -> None:
    logits = random_logits(64, 8)
    logits[:, 5:] = float("-inf")  # rows of a padded vocabulary
    uniforms = torch.linspace(0, LARGEST, 64, dtype=torch.float64)
    tokens, log_probs = sample(logits, uniforms, SamplingConfig())
    require_finite(log_probs)
    assert int(tokens.max()) == 4
