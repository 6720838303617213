"""SwiGLU's kernel, on the emulator: against fp64, torch's own error, schedules, alignments, sizes, bad input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.swiglu import benchmark, op, reference
from tests.cuda_ext.emulated import DTYPES, draw, emulated, no_worse_than, rounded_once, same_bits, shifted, sparse

# One number, a pack and less and more, a block and less and more, several.
SHAPES = [(1,), (8,), (7, 3), (3, 5, 9), (2, 1024), (2049,), (5, 1000)]


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """gate, up and a gradient of y."""
    gate, up, dy = (draw(*shape, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    return [gate * 4, up, dy]


def both_ways(values: list[Tensor], call: Callable[[Tensor, Tensor], Tensor] = op.swiglu) -> list[Tensor]:
    """y, and gradients of gate and up."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in values[:2]]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, values[2])]


def exact(values: list[Tensor]) -> list[Tensor]:
    return both_ways([x.double() for x in values], reference.swiglu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_it_rounds_once_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = inputs(*shape, dtype=dtype)
    with emulated(seed=sum(shape)):
        got = both_ways(values)
    for ours, theirs, true in zip(got, both_ways(values, reference.swiglu), exact(values), strict=True):
        rounded_once(ours, true)
        no_worse_than(theirs, ours, true)


def test_emulated_bits_depend_on_no_schedule() -> None:
    values = inputs(3, 1001, dtype=torch.bfloat16)
    same_bits(lambda: tuple(both_ways(values)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_an_element_depends_on_no_other_nor_on_its_place(dtype: torch.dtype) -> None:
    values = inputs(2053, dtype=dtype)
    with emulated():
        whole = both_ways(values)
        for part in (slice(0, 1), slice(3, 36), slice(2048, 2053), slice(5, 1500)):
            for a, b in zip(both_ways([x[part] for x in values]), whole, strict=True):
                assert torch.equal(a, b[part])


def test_emulated_wherever_the_numbers_lie() -> None:
    values = inputs(4, 257, dtype=torch.float16)
    with emulated():
        plain = both_ways(values)
        y = op.fused(shifted(values[0]), values[1])  # two alignments in one call
        moved = op.fused_backward(values[2], values[0], shifted(values[1]))
        strided = [torch.stack([x, x], -1)[..., 0] for x in values]
        apart = op.fused(*strided[:2]), *op.fused_backward(strided[2], *strided[:2])
    for a, b, c in zip(plain, (y, *moved), apart, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_emulated_nothing_at_all_and_what_is_not_a_number() -> None:
    inf, nan = torch.inf, torch.nan
    gate = torch.tensor([nan, 1.0, inf, -200.0, 200.0, -90.0])
    up = torch.tensor([1.0, nan, 1.0, 1.0, 1.0, inf])
    with emulated():
        assert both_ways(inputs(0, 8))[0].shape == (0, 8)
        y, dgate, dup = both_ways([gate, up, torch.ones(6)])
    torch.testing.assert_close(y, reference.swiglu(gate, up), equal_nan=True)
    assert y[:2].isnan().all()
    assert y[2:5].tolist() == [inf, -0.0, 200.0]
    assert dgate[3:5].tolist() == [0, 1]
    assert dup[3:5].tolist() == [0, 200]


def test_emulated_beyond_two_to_the_31st() -> None:
    """Only the last block runs, a pack and one number of 2^31 + 2^12 + 9: the rest is never written."""
    numel = 2**31 + 2**12 + 9
    gate, up = (sparse(numel, dtype=torch.bfloat16) for _ in range(2))
    for x, seed in ((gate, 1), (up, 2)):
        x[-9:] = draw(9, dtype=torch.bfloat16, seed=seed)
    last = (numel - 1) // (256 * 8)
    with emulated(first_block=last):
        y = op.fused(gate, up)
        dgate, dup = op.fused_backward(up, gate, up)
    tail = [x[-9:].clone() for x in (gate, up, up)]
    with emulated():
        for a, b in zip((y, dgate, dup), both_ways(tail), strict=True):
            assert torch.equal(a[-9:], b)


def test_emulated_strict_mode_takes_the_kernel_as_well() -> None:
    gate, up, _ = inputs(70)
    with emulated():
        assert torch.equal(op.swiglu(gate, up, strict=True), op.swiglu(gate, up))


def test_emulated_torch_finds_nothing_wrong_with_the_operators() -> None:
    gate, up, dy = inputs(3, 8)
    with emulated():
        torch.library.opcheck(op.fused, (gate.requires_grad_(), up.requires_grad_()))
        torch.library.opcheck(op.fused_backward, (dy, gate.detach(), up.detach()))


def test_emulated_it_stays_in_a_compiled_graph() -> None:
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return op.swiglu(gate * 2, up) + 1

    with emulated():
        compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
        for a, b in zip(both_ways(inputs(3, 8), compiled), both_ways(inputs(3, 8), gated), strict=True):
            assert torch.equal(a, b)


def test_emulated_a_second_derivative_is_refused() -> None:
    gate, up, _ = inputs(4)
    with emulated():
        (dgate,) = torch.autograd.grad(op.swiglu(gate.requires_grad_(), up).sum(), gate, create_graph=True)
        with pytest.raises(RuntimeError, match="swiglu_backward"):
            torch.autograd.grad(dgate.sum(), gate)


def test_emulated_the_benchmark_s_sides_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # half a minute of C++
    with emulated():
        for case in benchmark.cases("cpu", sizes=[(3, 16)]):
            outputs = [side() for side in (case.ours, case.rivals["eager"])]
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in outputs), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"up": torch.ones(8, 3)}, r"up is float32 \[8,3\] beside gate of float32 \[3,8\]: both must be alike"),
        ({"up": torch.ones(3, 8).half()}, r"up is float16 \[3,8\] beside gate of float32 \[3,8\]"),
        ({"y": torch.empty(3, 9)}, r"y is float32 \[3,9\] beside gate of float32 \[3,8\]"),
        ({"gate": torch.ones(8, 3).t()}, r"gate \[3,8\] has stride 3 in dimension 1, not 1"),
        ({"gate": torch.ones(3, 8).double()}, "gate is float64, not float32, bfloat16 or float16"),
    ],
)
def test_emulated_what_does_not_fit_is_named(change: dict[str, Tensor], says: str) -> None:
    arguments = {"gate": torch.ones(3, 8), "up": torch.ones(3, 8), "y": torch.empty(3, 8)} | change
    with emulated(), pytest.raises(RuntimeError, match="swiglu_forward: " + says):
        library.operators(torch.ones(1)).swiglu_forward(*arguments.values())
