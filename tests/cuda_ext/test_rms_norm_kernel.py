"""RMSNorm's kernel, on the emulator: against fp64, torch's own error, schedules, alignments, sizes, bad input."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.rms_norm import op, reference
from tests.cuda_ext.emulated import DTYPES, draw, emulated, no_worse_than, rounded_once, same_bits, shifted, sparse

EPS = 1e-5
# Rows x width: one number, a warp's part, odd ones, every number of packs a thread, wider than registers.
SHAPES = [(1, 1), (3, 8), (5, 64), (3, 192), (131, 760), (2, 1128), (3, 4096), (1, 8192), (2, 16384), (1, 40960)]


def inputs(shape: Sequence[int], dtype: torch.dtype, weight: torch.dtype | None = None) -> list[Tensor]:
    """x, residual, weight, and gradients of y and of the sum."""
    rows = [draw(*shape, dtype=dtype, seed=seed) for seed in (1, 2, 4, 5)]
    return [rows[0], rows[1], draw(shape[-1], dtype=weight or dtype, seed=3), rows[2], rows[3]]


def both_ways(values: list[Tensor], norm: object = op.rms_norm) -> list[Tensor]:
    """y, sum, and gradients of x, residual and weight."""
    x, residual, weight, dy, dtotal = values
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, residual, weight)]
    y, total = norm(leaves[0], leaves[2], EPS, leaves[1])  # type: ignore[operator]
    return [y.detach(), total.detach(), *torch.autograd.grad([y, total], leaves, [dy, dtotal])]


def exact(values: list[Tensor]) -> list[Tensor]:
    """In fp64, from the sum as it was rounded."""
    x, residual, weight, dy, dtotal = values
    total = (x + residual).double().requires_grad_()
    wide_weight = weight.double().requires_grad_()
    y = reference.rms_norm(total, wide_weight, EPS)
    assert isinstance(y, Tensor)
    dx, dweight = torch.autograd.grad([y, total * 1], [total, wide_weight], [dy.double(), dtotal.double()])
    return [y.detach(), total.detach(), dx, dx, dweight]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_it_rounds_once_forward_and_backward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = inputs(shape, dtype)
    with emulated(seed=sum(shape)):
        got = both_ways(values)
    eager = both_ways(values, reference.rms_norm)
    for ours, theirs, true in zip(got, eager, exact(values), strict=True):
        rounded_once(ours, true, sums=2.0**-20)
        no_worse_than(theirs, ours, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_emulated_with_a_weight_in_fp32(dtype: torch.dtype) -> None:
    values = inputs((6, 256), dtype, weight=torch.float32)
    with emulated():
        got = both_ways(values)
    assert got[-1].dtype == torch.float32
    for ours, true in zip(got, exact(values), strict=True):
        rounded_once(ours, true, sums=2.0**-20)


def test_emulated_without_a_residual() -> None:
    x, _, weight, dy, _ = inputs((7, 96), torch.float32)
    leaves = [leaf.double().requires_grad_() for leaf in (x, weight)]
    true = reference.rms_norm(leaves[0], leaves[1], EPS)
    assert isinstance(true, Tensor)
    theirs = torch.autograd.grad(true, leaves, dy.double())
    x.requires_grad_(), weight.requires_grad_()
    with emulated():
        y = op.rms_norm(x, weight, EPS)
        ours = torch.autograd.grad(y, (x, weight), dy)
    for a, b in zip((y.detach(), *ours), (true.detach(), *theirs), strict=True):
        rounded_once(a, b, sums=2.0**-20)


@pytest.mark.parametrize("shape", [(300, 64), (3, 4096), (2, 40960)], ids=str)
def test_emulated_bits_depend_on_no_schedule(shape: tuple[int, int]) -> None:
    values = inputs(shape, torch.bfloat16)
    same_bits(lambda: tuple(both_ways(values)))


@pytest.mark.parametrize("width", [64, 4096, 4100])
def test_emulated_a_row_depends_on_no_other_row(width: int) -> None:
    x, residual, weight, *_ = inputs((9, width), torch.bfloat16)
    with emulated():
        whole = op.rms_norm(x, weight, EPS, residual)
        for row in (0, 8):
            alone = op.rms_norm(x[row : row + 1], weight, EPS, residual[row : row + 1])
            for a, b in zip(alone, whole, strict=True):
                assert torch.equal(a[0], b[row])


def test_emulated_wherever_the_numbers_lie() -> None:
    values = inputs((4, 256), torch.bfloat16)
    strided = [torch.stack([x, x], -1)[..., 0] if x.dim() == 2 else x for x in values]
    with emulated():
        plain, moved, apart = both_ways(values), both_ways([shifted(x) for x in values]), both_ways(strided)
    for a, b, c in zip(plain, moved, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)  # a row is summed in another order
        assert torch.equal(a, c)


def test_emulated_nothing_at_all_and_what_is_not_a_number() -> None:
    with emulated():
        assert op.rms_norm(torch.empty(0, 8), torch.ones(8), EPS).shape == (0, 8)
        y = op.rms_norm(torch.tensor([[1.0, torch.nan], [3.0, 4.0], [torch.inf, 1.0]]), torch.ones(2), EPS)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    assert y[2][0].isnan()
    assert y[2][1] == 0


def test_emulated_beyond_two_to_the_31st() -> None:
    """Only the last rows run: x has 2^31 + 2^16 elements, 4 GiB that are never written."""
    rows, width = 32769, 65536
    x, weight = sparse(rows, width, dtype=torch.bfloat16), draw(width, dtype=torch.bfloat16)
    x[-1] = draw(width, dtype=torch.bfloat16, seed=1)
    with emulated(first_block=rows - 1):
        y, inverse = op.fused(x, weight, EPS)
    assert torch.equal(y[-1], reference.rms_norm(x[-1], weight, EPS))
    last = (rows - 1) % op.LINES
    dy = sparse(rows, width, dtype=torch.bfloat16)
    dy[-1] = 1
    inverse.fill_(inverse[-1])
    with emulated(first_block=last, last_block=last):
        dx, _ = op.fused_backward(dy, None, x, weight, inverse)
    leaf = x[-1].double().requires_grad_()
    true = reference.rms_norm(leaf, weight.double(), EPS)
    assert isinstance(true, Tensor)
    rounded_once(dx[-1], torch.autograd.grad(true.sum(), leaf)[0], sums=2.0**-18)


def test_emulated_torch_finds_nothing_wrong_with_the_operators() -> None:
    x, residual, weight, dy, dtotal = inputs((3, 8), torch.float32)
    inverse = torch.ones(3)
    with emulated():
        leaves = [leaf.requires_grad_() for leaf in (x, residual, weight)]
        torch.library.opcheck(op.fused, (leaves[0], leaves[2], EPS))
        torch.library.opcheck(op.fused_with_residual, (*leaves, EPS))
        torch.library.opcheck(op.fused_backward, (dy, dtotal, x.detach(), weight.detach(), inverse))


def test_emulated_it_stays_in_a_compiled_graph() -> None:
    values = inputs((3, 8), torch.float32)

    def normed(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        return op.rms_norm(x * 2, weight, eps, residual)

    with emulated():
        compiled = torch.compile(normed, fullgraph=True, backend="aot_eager")
        for a, b in zip(both_ways(values, compiled), both_ways(values, normed), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.update(weight=torch.ones(7)), r"weight \[7\] has 7 elements, not 8"),
        (lambda a: a.update(weight=torch.ones(8).half()), "weight is float16 beside x of float32"),
        (lambda a: a.update(y=torch.empty(3, 9)), r"y \[3,9\] has 27 elements, not 24"),
        (lambda a: a.update(y=torch.empty(3, 8).half()), "y is float16, not float32"),
        (lambda a: a.update(x=torch.empty(8, 3).t()), r"x \[3,8\] has stride 3 in dimension 1, not 1"),
        (lambda a: a.update(x=torch.empty(3, 8).double()), "x is float64, not float32, bfloat16 or float16"),
        (lambda a: a.update(inverse=torch.empty(2)), r"inverse \[2\] has 2 elements, not 3"),
        (lambda a: a.update(x=torch.tensor(1.0)), r"x \[\] has rows of 0"),
    ],
)
def test_emulated_what_does_not_fit_is_named(change: object, says: str) -> None:
    arguments = {
        "x": torch.ones(3, 8), "residual": None, "weight": torch.ones(8), "eps": EPS,
        "y": torch.empty(3, 8), "total": None, "inverse": torch.empty(3),
    }  # fmt: skip
    change(arguments)  # type: ignore[operator]
    with emulated(), pytest.raises(RuntimeError, match="rms_norm_forward: " + says):
        library.operators(torch.ones(1)).rms_norm_forward(*arguments.values())
