"""LayerNorm's kernel, on the emulator. What it shares with RMSNorm's (device/norm.cuh) has more sizes there."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.layer_norm import op, reference
from tests.cuda_ext.emulated import DTYPES, draw, emulated, no_worse_than, rounded_once, same_bits, shifted, sparse

EPS = 1e-5
SHAPES = [(3, 8), (131, 760), (2, 1128), (3, 4096), (1, 8192), (2, 16384)]


def inputs(shape: Sequence[int], dtype: torch.dtype, weight: torch.dtype | None = None) -> list[Tensor]:
    """x, residual, weight, bias, and gradients of y and of the sum. Rows are far from zero, as sums of squares hate."""
    x, residual, dy, dtotal = (draw(*shape, dtype=dtype, seed=seed) for seed in (1, 2, 5, 6))
    return [x + 10, residual, *(draw(shape[-1], dtype=weight or dtype, seed=seed) for seed in (3, 4)), dy, dtotal]


def both_ways(values: list[Tensor], norm: object = op.layer_norm) -> list[Tensor]:
    """y, sum, and gradients of x, residual, weight and bias."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in values[:4]]
    y, total = norm(leaves[0], leaves[2], leaves[3], EPS, leaves[1])  # type: ignore[operator]
    return [y.detach(), total.detach(), *torch.autograd.grad([y, total], leaves, values[4:])]


def exact(values: list[Tensor]) -> list[Tensor]:
    """In fp64, from the sum as it was rounded."""
    x, residual, weight, bias, dy, dtotal = values
    leaves = [leaf.double().requires_grad_() for leaf in (x + residual, weight, bias)]
    y = reference.layer_norm(*leaves, EPS)
    assert isinstance(y, Tensor)
    dx, dweight, dbias = torch.autograd.grad([y, leaves[0] * 1], leaves, [dy.double(), dtotal.double()])
    return [y.detach(), leaves[0].detach(), dx, dx, dweight, dbias]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_it_rounds_once_forward_and_backward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = inputs(shape, dtype)
    with emulated(seed=sum(shape)):
        got = both_ways(values)
    eager = both_ways(values, reference.layer_norm)
    for ours, theirs, true in zip(got, eager, exact(values), strict=True):
        rounded_once(ours, true, sums=2.0**-18)
        no_worse_than(theirs, ours, true)


@pytest.mark.parametrize("bias", [True, False])
def test_emulated_without_a_residual_or_a_bias(bias: bool) -> None:
    x, _, weight, offset, dy, _ = inputs((7, 96), torch.bfloat16, weight=torch.float32)
    given = [x, weight, offset] if bias else [x, weight]
    leaves, wide = [[leaf.to(kind).requires_grad_() for leaf in given] for kind in (None, torch.float64)]
    true = reference.layer_norm(wide[0], wide[1], wide[2] if bias else None, EPS)
    assert isinstance(true, Tensor)
    with emulated():
        y = op.layer_norm(leaves[0], leaves[1], leaves[2] if bias else None, EPS)
        ours = torch.autograd.grad(y, leaves, dy)
    for a, b in zip((y.detach(), *ours), (true.detach(), *torch.autograd.grad(true, wide, dy.double())), strict=True):
        rounded_once(a, b, sums=2.0**-18)


def test_emulated_bits_depend_on_no_schedule_and_no_other_row() -> None:
    values = inputs((300, 64), torch.bfloat16)
    same_bits(lambda: tuple(both_ways(values)))
    x, _, weight, bias, *_ = values
    with emulated():
        assert torch.equal(op.layer_norm(x, weight, bias, EPS)[7], op.layer_norm(x[7:8], weight, bias, EPS)[0])


def test_emulated_wherever_the_numbers_lie() -> None:
    values = inputs((4, 256), torch.bfloat16)
    with emulated():
        plain, moved = both_ways(values), both_ways([shifted(x) for x in values])
        empty = op.layer_norm(torch.empty(0, 8), torch.ones(8), None, EPS)
    for a, b in zip(plain, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
    assert empty.shape == (0, 8)


def test_emulated_beyond_two_to_the_31st() -> None:
    """Only the last row runs: 4 GiB that are never written."""
    x, weight = sparse(32769, 65536, dtype=torch.bfloat16), draw(65536, dtype=torch.bfloat16)
    x[-1] = draw(65536, dtype=torch.bfloat16, seed=1)
    with emulated(first_block=32768):
        y = op.fused(x, None, weight, None, EPS)[0]
    true = reference.layer_norm(x[-1].double(), weight.double(), None, EPS)
    assert isinstance(true, Tensor)
    rounded_once(y[-1], true, sums=2.0**-18)


def test_emulated_torch_finds_nothing_wrong_with_the_operators() -> None:
    x, residual, weight, bias, dy, dtotal = inputs((3, 8), torch.float32)
    mean, inverse = torch.zeros(3), torch.ones(3)
    with emulated():
        torch.library.opcheck(op.fused_backward, (dy, dtotal, x, weight, mean, inverse))
        leaves = [leaf.requires_grad_() for leaf in (x, residual, weight, bias)]
        torch.library.opcheck(op.fused, (*leaves, EPS))
        torch.library.opcheck(op.fused, (x, None, weight, None, EPS))


def test_emulated_what_does_not_fit_is_named() -> None:
    x, y, row = torch.ones(3, 8), torch.empty(3, 8), torch.empty(3)
    run = library.operators(x).layer_norm_forward
    with emulated():
        with pytest.raises(RuntimeError, match=r"layer_norm_forward: bias is bfloat16, not float32"):
            run(x, None, torch.ones(8), torch.ones(8).bfloat16(), EPS, y, None, row, row)
        with pytest.raises(RuntimeError, match=r"layer_norm_forward: mean \[2\] has 2 elements, not 3"):
            run(x, None, torch.ones(8), None, EPS, y, None, torch.empty(2), row)


def test_emulated_it_stays_in_a_compiled_graph_and_nan_in_its_row() -> None:
    values = inputs((3, 8), torch.float32)
    with emulated():
        compiled = torch.compile(op.layer_norm, fullgraph=True, backend="aot_eager")
        for a, b in zip(both_ways(values, compiled), both_ways(values), strict=True):
            assert torch.equal(a, b)
        values[0][1, 2] = torch.nan
        broken = op.layer_norm(values[0], values[2], values[3], EPS)
    assert broken[1].isnan().all()
    assert broken[[0, 2]].isfinite().all()
