"""LayerNorm's reference: a row by hand, the residual form, finite differences."""

import torch

from cuda_ext.layer_norm.op import layer_norm


def test_a_row_by_hand() -> None:
    """Mean 2, variance 1; with eps 3 the divisor is 2."""
    y = layer_norm(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]), torch.tensor([0.0, 1.0]), 3.0)
    torch.testing.assert_close(y, torch.tensor([-0.5, 3.0]))


def test_with_a_residual_the_sum_is_normalised_and_returned() -> None:
    torch.manual_seed(0)
    x, residual, w, b = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6), torch.randn(6)
    y, total = layer_norm(x, w, b, 1e-5, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, layer_norm(x + residual, w, b, 1e-5))


def test_finite_differences() -> None:
    torch.manual_seed(0)
    x, w, b, r = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 4), (4,), (4,), (2, 4)))
    assert torch.autograd.gradcheck(lambda *leaves: layer_norm(*leaves[:3], 1e-5, leaves[3]), (x, w, b, r))
