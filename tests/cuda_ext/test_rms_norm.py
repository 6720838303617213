"""RMSNorm: a row by hand, torch's own, the residual form, precision, finite differences."""

import torch
import torch.nn.functional as F

from cuda_ext.rms_norm.op import rms_norm


def test_a_row_by_hand() -> None:
    """Mean square of (3, 4) is 12.5; with eps 3.5 the divisor is 4."""
    y = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 3.5)
    torch.testing.assert_close(y, torch.tensor([0.75, 2.0]))


def test_equals_torch_and_its_gradients() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    w.requires_grad_()
    ours, theirs = rms_norm(x, w, 1e-5), F.rms_norm(x, (7,), w, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    weights = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), (x, w)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_with_a_residual_the_sum_is_normalised_and_returned() -> None:
    torch.manual_seed(0)
    x, residual, w = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    y, total = rms_norm(x, w, 1e-5, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(x + residual, w, 1e-5))


def test_bf16_is_computed_wide_and_rounded_once() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 256).bfloat16(), torch.randn(256).bfloat16()
    exact = F.rms_norm(x.double(), (256,), w.double(), 1e-5)
    y = rms_norm(x, w, 1e-5)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01).all()  # half a unit in the last place


def test_finite_differences() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)]
    inputs[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), inputs)
    more = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, 1e-5, r), [*inputs, more])
