"""Rotary embedding: a quarter turn by hand, complex multiplication, relative positions, finite differences."""

import math

import torch

from cuda_ext.rotary.op import rotary


def test_a_quarter_turn_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)  # pairs (1, 3) and (2, 4)
    angle = torch.tensor([math.pi / 2, 0.0, math.pi / 2, 0.0]).view(1, 1, 4)
    y = rotary(x, angle.cos(), angle.sin())
    torch.testing.assert_close(y.flatten(), torch.tensor([-3.0, 2.0, 1.0, 4.0]))


def test_equals_a_product_of_complex_numbers() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle).unsqueeze(2)
    both = torch.cat((angle, angle), -1)
    y = rotary(x, both.cos(), both.sin())
    torch.testing.assert_close(y, torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-14)


def test_keeps_the_dtype_and_computes_in_the_wider_one() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(1, 6, 2, 4).bfloat16(), torch.randn(1, 6, 2)
    both = torch.cat((angle, angle), -1)
    y = rotary(x, both.cos(), both.sin())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotary(x.float(), both.cos(), both.sin()).bfloat16())


def test_finite_differences() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True), torch.randn(1, 2, 4).double()
    assert torch.autograd.gradcheck(lambda x: rotary(x, angle.cos(), angle.sin()), [x])
