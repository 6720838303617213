"""Rotary positions' kernel on the emulator: against fp64, torch's own error, schedules, strides, sizes, bad input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.rotary import benchmark, op, reference
from tests.cuda_ext.emulated import DTYPES, draw, emulated, no_worse_than, rounded_once, same_bits, shifted, sparse

# One head of two numbers, odd halves, one pack a half, several blocks, more heads than threads, more packs.
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 6), (1, 7, 3, 16), (2, 9, 4, 64), (1, 2, 70, 128), (1, 1, 2, 1040)]


def inputs(*shape: int, dtype: torch.dtype = torch.float32, batch: int | None = None) -> list[Tensor]:
    """x, cos, sin (of `batch` rows) and a gradient of y."""
    angles = 3 * draw(batch or shape[0], shape[1], shape[3] // 2, seed=2)
    both = torch.cat((angles, angles), -1)
    return [draw(*shape, dtype=dtype, seed=1), both.cos(), both.sin(), draw(*shape, dtype=dtype, seed=3)]


def both_ways(values: list[Tensor], call: Callable[[Tensor, Tensor, Tensor], Tensor] = op.rotary) -> list[Tensor]:
    """y, and the gradient of x."""
    leaf = values[0].detach().requires_grad_()
    y = call(leaf, values[1], values[2])
    return [y.detach(), *torch.autograd.grad(y, leaf, values[3])]


def exact(values: list[Tensor]) -> list[Tensor]:
    return both_ways([x.double() for x in values], reference.rotary)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_it_rounds_once_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = inputs(*shape, dtype=dtype)
    with emulated(seed=sum(shape)):
        got = both_ways(values)
    for ours, theirs, true in zip(got, both_ways(values, reference.rotary), exact(values), strict=True):
        rounded_once(ours, true)
        no_worse_than(theirs, ours, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_emulated_one_table_for_all_rows_in_any_dtype(dtype: torch.dtype) -> None:
    x, cos, sin, dy = inputs(3, 5, 2, 32, batch=1)
    values = [x, cos.to(dtype), sin.to(dtype), dy]
    with emulated():
        got = both_ways(values)
    for ours, true in zip(got, exact(values), strict=True):
        rounded_once(ours, true)


def test_emulated_bits_depend_on_no_schedule() -> None:
    values = inputs(2, 5, 6, 48, dtype=torch.bfloat16)
    same_bits(lambda: tuple(both_ways(values)))


def test_emulated_a_row_depends_on_no_other_row() -> None:
    x, cos, sin, _ = inputs(3, 9, 6, 64, dtype=torch.bfloat16)
    with emulated():
        whole = op.rotary(x, cos, sin)
        part = op.rotary(x[1:2, 4:5, 2:3], cos[1:2, 4:5], sin[1:2, 4:5])
    assert torch.equal(part, whole[1:2, 4:5, 2:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_wherever_the_numbers_lie(dtype: torch.dtype) -> None:
    """A part of joined queries, keys and values; heads before places; one number off 16 bytes; no stride of 1."""
    x, cos, sin, dy = inputs(2, 6, 4, 32, dtype=dtype)
    joined = torch.stack([dy, x, dy], 2).flatten(2, 3)[:, :, 4:8]
    forms = [joined, x.transpose(1, 2).contiguous().transpose(1, 2), shifted(x), torch.stack([x, x], -1)[..., 0]]
    assert joined.stride() == (6 * 12 * 32, 12 * 32, 32, 1)
    with emulated():
        plain = both_ways([x, cos, sin, dy])
        for form in forms:
            assert all(torch.equal(a, b) for a, b in zip(both_ways([form, cos, sin, dy]), plain, strict=True))
            assert torch.equal(op.fused(form, shifted(cos), sin, 1.0), plain[0])
        wide = [torch.stack([table, table], -1)[..., 0] for table in (cos, sin)]
        assert torch.equal(op.fused(x, *wide, 1.0), plain[0])


def test_emulated_a_strided_part_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    x, cos, sin, _ = inputs(2, 6, 9, 32)
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail(f"{tuple(self.shape)} is copied"))
    with emulated():
        op.fused(x[:, :, 3:6], cos, sin, 1.0)


def test_emulated_nothing_at_all_and_what_is_not_a_number() -> None:
    x, cos, sin, _ = inputs(1, 2, 1, 4)
    x[0, 0, 0] = torch.tensor([torch.nan, 1.0, 2.0, torch.inf])
    with emulated():
        for shape in ((0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)):
            assert op.rotary(*inputs(*shape)[:3]).shape == shape
        y = op.rotary(x, cos, sin)
    assert y[0, 0, 0, ::2].isnan().all()
    assert y[0, 0, 0, 1::2].isinf().all()
    assert y[0, 1].isfinite().all()


def test_emulated_turning_back_is_what_turning_undoes_and_has_a_derivative_too() -> None:
    x, cos, sin, dy = inputs(1, 3, 2, 8)
    with emulated():
        back = op.fused(op.fused(x, cos, sin, 1.0), cos, sin, -1.0)
        leaf = dy.clone().requires_grad_()
        (again,) = torch.autograd.grad(op.fused(leaf, cos, sin, -1.0), leaf, x)
        assert torch.equal(again, op.fused(x, cos, sin, 1.0))
    torch.testing.assert_close(back, x)


def test_emulated_angles_that_are_learned_get_their_gradients() -> None:
    x, cos, sin, dy = inputs(1, 3, 2, 8)
    with emulated():
        ours = torch.autograd.grad(op.rotary(x, cos.requires_grad_(), sin), cos, dy)
    assert torch.equal(ours[0], torch.autograd.grad(reference.rotary(x, cos, sin), cos, dy)[0])


def test_emulated_beyond_two_to_the_31st() -> None:
    """Only the last block runs, on the last place of 2^31 + 2^18 numbers, and of 2^33 that x is a part of."""
    length, heads, size = 2**17 + 16, 128, 128
    joined = sparse(1, length, 4 * heads, size, dtype=torch.bfloat16)
    x, tables = joined[:, :, heads : 2 * heads], [sparse(1, length, size, dtype=torch.float32) for _ in range(2)]
    few, *angles, _ = inputs(1, 1, heads, size, dtype=torch.bfloat16)
    x[:, -1:] = few
    for table, last in zip(tables, angles, strict=True):
        table[:, -1:] = last
    with emulated(first_block=length - 1):
        y = op.fused(x, *tables, 1.0)
    with emulated():
        assert torch.equal(y[:, -1:], op.fused(few, *angles, 1.0))


def test_emulated_torch_finds_nothing_wrong_with_the_operator() -> None:
    x, cos, sin, _ = inputs(1, 3, 2, 8)
    with emulated():
        torch.library.opcheck(op.fused, (x.requires_grad_(), cos, sin, 1.0))
        torch.library.opcheck(op.fused, (x.detach()[:, :, 1:], cos, sin, -1.0))


def test_emulated_it_stays_in_a_compiled_graph() -> None:
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return op.rotary(x * 2, cos, sin) + 1

    values = inputs(1, 3, 2, 8)
    with emulated():
        compiled = torch.compile(turned, fullgraph=True, backend="aot_eager")
        for a, b in zip(both_ways(values, compiled), both_ways(values, turned), strict=True):
            assert torch.equal(a, b)


def test_emulated_the_benchmark_s_sides_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # half a minute of C++
    with emulated():
        for case in benchmark.cases("cpu", sizes=[(2, 3, 2, 16)]):
            outputs = [side() for side in (case.ours, case.rivals["eager"])]
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in outputs), strict=True):
                torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.ones(1, 3, 2, 7)}, r"x \[1,3,2,7\] is not \[B,T,N,H\] with H even"),
        ({"x": torch.ones(3, 2, 8)}, r"x \[3,2,8\] is not \[B,T,N,H\] with H even"),
        ({"x": torch.ones(1, 3, 8, 2).mT}, "x has stride 2 in its last dimension, not 1"),
        ({"x": torch.ones(1, 3, 2, 8).double()}, "x is float64, not float32, bfloat16 or float16"),
        ({"cos": torch.ones(2, 3, 8)}, r"cos \[2,3,8\] does not fit x \[1,3,2,8\]: \[B\|1,T,H\] is needed"),
        ({"sin": torch.ones(1, 3, 4)}, r"sin \[1,3,4\] does not fit x \[1,3,2,8\]"),
        ({"sin": torch.ones(1, 8, 3).mT}, "sin has stride 3 in its last dimension, not 1"),
        ({"cos": torch.ones(1, 3, 8).half()}, "cos is float16, not float32"),
        ({"y": torch.ones(1, 3, 8, 2)}, r"y is float32 \[1,3,8,2\] beside x of float32 \[1,3,2,8\]"),
    ],
)
def test_emulated_what_does_not_fit_is_named(change: dict[str, Tensor], says: str) -> None:
    table = torch.ones(1, 3, 8)
    arguments = {"x": torch.ones(1, 3, 2, 8), "cos": table, "sin": table, "sign": 1.0, "y": torch.empty(1, 3, 2, 8)}
    with emulated(), pytest.raises(RuntimeError, match="rotary_forward: " + says):
        library.operators(torch.ones(1)).rotary_forward(*(arguments | change).values())
