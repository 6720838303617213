"""SwiGLU: numbers by hand, both forms alike, and the strict form's bits independent of an element's place."""

import math

import pytest
import torch

from cuda_ext.swiglu.op import swiglu
from framework.core.runtime import num_threads


@pytest.mark.parametrize("strict", [False, True])
def test_by_hand(strict: bool) -> None:
    """silu(ln 3) = ln 3 * 3/4; silu(-ln 3) = -ln 3 / 4."""
    gate, up = torch.tensor([math.log(3), -math.log(3), 0.0]), torch.tensor([4.0, 4.0, 5.0])
    expected = torch.tensor([3 * math.log(3), -math.log(3), 0.0])
    torch.testing.assert_close(swiglu(gate, up, strict=strict), expected)


def test_both_forms_agree_far_out_with_finite_gradients() -> None:
    gate = torch.tensor([-200.0, -90.0, -20.0, -1.0, 0.0, 1.0, 20.0, 90.0, 200.0], dtype=torch.float64)
    gate.requires_grad_()
    up = torch.full_like(gate, 2.0)
    plain, strict = swiglu(gate, up), swiglu(gate, up, strict=True)
    torch.testing.assert_close(plain, strict, rtol=0, atol=1e-13)
    a, b = (torch.autograd.grad(y.sum(), gate)[0] for y in (plain, strict))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("threads", [1, 2])
def test_strict_bits_do_not_depend_on_an_elements_place(threads: int) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(2, 70001) * 3
    with num_threads(threads):
        whole = swiglu(gate, up, strict=True)
        for start, size in ((0, 1), (1, 7), (3, 33), (17, 31), (5, 1000), (35001, 35000), (2, 69999)):
            part = slice(start, start + size)
            assert torch.equal(swiglu(gate[part].clone(), up[part].clone(), strict=True), whole[part])


@pytest.mark.parametrize("strict", [False, True])
def test_finite_differences(strict: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda g, u: swiglu(g, u, strict=strict), inputs)
