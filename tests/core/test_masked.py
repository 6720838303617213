"""Masked statistics against torch's own on the selected entries; what is masked never leaks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from framework.core.masked import counting, masked_mean, masked_sum, masked_variance, ratio

STATISTICS = [masked_sum, masked_mean, masked_variance]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 7))
def test_statistics_are_those_of_the_selected_entries(seed: int, rows: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[0, :2] = True
    kept = x[mask]
    torch.testing.assert_close(masked_sum(x, mask), kept.sum())
    torch.testing.assert_close(masked_mean(x, mask), kept.mean())
    torch.testing.assert_close(masked_variance(x, mask), kept.var())
    torch.testing.assert_close(masked_variance(x, mask, unbiased=False), kept.var(correction=0))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_masked_reaches_neither_result_nor_gradient(statistic: object, poison: float) -> None:
    x = torch.tensor([1.0, poison, 4.0], requires_grad=True)
    clean = torch.tensor([1.0, 0.0, 4.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    results: list[Tensor] = []
    for leaf in (x, clean):
        result = statistic(leaf, mask)  # type: ignore[operator]
        result.backward()
        results.append(result)
    assert torch.equal(results[0], results[1])
    assert x.grad is not None
    assert torch.equal(x.grad, clean.grad)
    assert x.grad[1] == 0


@pytest.mark.parametrize("statistic", STATISTICS)
def test_nothing_counting_gives_zero(statistic: object) -> None:
    x = torch.full((2, 2), float("nan"))
    assert statistic(x, torch.zeros(2, 2, dtype=torch.bool)) == 0  # type: ignore[operator]


def test_one_entry_has_no_variance() -> None:
    assert masked_variance(torch.tensor([3.0, 5.0]), torch.tensor([True, False])) == 0


def test_counting_zeroes_the_rest() -> None:
    x = torch.tensor([float("nan"), 2.0])
    assert counting(x, torch.tensor([False, True])).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("denominator", [4, 4.0, torch.tensor(4), torch.tensor([4]), torch.tensor([[4.0]])])
def test_ratio_takes_any_kind_of_count_and_gives_a_scalar(denominator: Tensor | float) -> None:
    result = ratio(torch.tensor(10.0, dtype=torch.float64), denominator)
    assert result.shape == ()
    assert result.dtype == torch.float64
    assert result == 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_of_nothing_is_zero_with_zero_gradient(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    nothing = ratio(masked_sum(x, torch.tensor([False, False])), 0)
    nothing.backward()
    assert nothing == 0
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0]


def test_ratio_of_something_by_nothing_is_loud() -> None:
    assert torch.isinf(ratio(torch.tensor(10.0), 0))
