"""Rows to experts and back: the reference by hand, the kernel on the emulator."""

import pytest
import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.moe import op, reference
from tests.cuda_ext.emulated import DTYPES, draw, emulated, no_worse_than, rounded_once, same_bits, shifted, sparse


def draw_rows(tokens: int, k: int, size: int, seed: int = 0) -> Tensor:
    """[tokens, k] different places below size."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return order[: tokens * k].view(tokens, k).to(torch.get_default_device())


def there_and_back(x: Tensor, rows: Tensor, weights: Tensor, size: int, how: object = op) -> Tensor:
    moved: Tensor = how.permute(x, rows, size)  # type: ignore[attr-defined]
    back: Tensor = how.unpermute(moved * moved, rows, weights)  # type: ignore[attr-defined]
    return back


def both_ways(x: Tensor, rows: Tensor, weights: Tensor, size: int, dout: Tensor, how: object = op) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, weights)]
    out = there_and_back(leaves[0], rows, leaves[1], size, how)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def test_two_tokens_by_hand() -> None:
    x, rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3, 0], [1, 4]])
    moved = op.permute(x, rows, 6)
    assert moved.tolist() == [[1, 2], [3, 4], [0, 0], [1, 2], [3, 4], [0, 0]]
    back = op.unpermute(torch.arange(12.0).view(6, 2), rows, torch.tensor([[1.0, 0.5], [2.0, 10.0]]))
    assert back.tolist() == [[6 + 0.5 * 0, 7 + 0.5 * 1], [2 * 2 + 80, 2 * 3 + 90]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "k", "width", "size"), [(1, 1, 1, 1), (5, 2, 24, 13), (9, 3, 100, 32), (3, 8, 4096, 24)]
)
def test_emulated_against_fp64(tokens: int, k: int, width: int, size: int, dtype: torch.dtype) -> None:
    x, weights, dout = (
        draw(tokens, width, dtype=dtype),
        draw(tokens, k, dtype=dtype, seed=1),
        draw(tokens, width, seed=2),
    )
    rows = draw_rows(tokens, k, size)
    true_y, moved = reference.permute(x.double(), rows, size), draw(size, width, dtype=dtype, seed=3)
    with emulated(seed=tokens):
        assert torch.equal(op.permute(x, rows, size).double(), true_y)
        ours = [leaf.clone().requires_grad_() for leaf in (moved, weights)]
        out = op.unpermute(ours[0], rows, ours[1])
        got = [out.detach(), *torch.autograd.grad(out, ours, dout.to(dtype))]
        leaf = x.clone().requires_grad_()
        dx = torch.autograd.grad(op.permute(leaf, rows, size), leaf, moved)[0]
    wide = [leaf.double().requires_grad_() for leaf in (moved, weights)]
    true = reference.unpermute(wide[0], rows, wide[1])
    exact = [true.detach(), *torch.autograd.grad(true, wide, dout.to(dtype).double())]
    eager = [leaf.clone().requires_grad_() for leaf in (moved, weights)]
    plain = reference.unpermute(eager[0], rows, eager[1])
    theirs = [plain.detach(), *torch.autograd.grad(plain, eager, dout.to(dtype))]
    for a, b, c in zip(got, theirs, exact, strict=True):
        rounded_once(a, c, sums=2.0**-20)
        no_worse_than(b, a, c)
    rounded_once(dx, moved.double()[rows].sum(1), sums=2.0**-20)


def test_emulated_bits_depend_on_no_schedule_and_on_no_other_token() -> None:
    x, weights, dout = draw(40, 72, dtype=torch.bfloat16), draw(40, 2, seed=1).bfloat16(), draw(40, 72).bfloat16()
    rows = draw_rows(40, 2, 96)
    same_bits(lambda: tuple(both_ways(x, rows, weights, 96, dout)))
    with emulated():
        whole = there_and_back(x, rows, weights, 96)
        alone = there_and_back(x[7:8], rows[7:8], weights[7:8], 96)
    assert torch.equal(whole[7], alone[0])


def test_emulated_wherever_the_numbers_lie_and_whatever_they_are() -> None:
    x, weights, rows = draw(6, 64, dtype=torch.bfloat16), draw(6, 2, seed=1).bfloat16(), draw_rows(6, 2, 16)
    with emulated():
        plain = there_and_back(x, rows, weights, 16)
        assert torch.equal(plain, there_and_back(shifted(x), rows, shifted(weights), 16))
        assert torch.equal(plain, there_and_back(x.t().contiguous().t(), rows, weights, 16))
        assert op.permute(x[:0], rows[:0], 4).eq(0).all()
        assert op.unpermute(x, rows[:0], weights[:0]).shape == (0, 64)
        x[2] = torch.nan
        broken = there_and_back(x, rows, weights, 16)
        rows[4, 1] = 16
        assert op.unpermute(x.new_ones(16, 64), rows, weights)[4].isnan().all(), "there is no row 16"
    assert broken[2].isnan().all()
    assert broken[[0, 1, 3, 4, 5]].isfinite().all()


def test_emulated_beyond_two_to_the_31st() -> None:
    """Only the last rows run."""
    size, width = 32769, 65536
    x, rows = draw(2, width, dtype=torch.bfloat16), torch.tensor([[0], [size - 1]])
    with emulated(first_block=size - 1):
        y = op.fused_permute(x, rows, size)
    assert torch.equal(y[-1], x[1])
    far = sparse(size, width, dtype=torch.bfloat16)
    far[-1] = x[0]
    with emulated():
        assert torch.equal(op.unpermute(far, torch.tensor([[size - 1]]), torch.ones(1, 1).bfloat16())[0], x[0])


def test_emulated_torch_finds_nothing_wrong_with_the_operators() -> None:
    x, rows, weights, y = draw(3, 8), draw_rows(3, 2, 8), draw(3, 2, seed=1), draw(8, 8, seed=2)
    with emulated():
        torch.library.opcheck(op.fused_unpermute_backward, (x, y, rows, weights))
        torch.library.opcheck(op.fused_permute, (x.requires_grad_(), rows, 8))
        torch.library.opcheck(op.fused_unpermute, (y.requires_grad_(), rows, weights.requires_grad_()))


def test_emulated_it_stays_in_a_compiled_graph() -> None:
    x, rows, weights, dout = draw(3, 8), draw_rows(3, 2, 8), draw(3, 2, seed=1), draw(3, 8, seed=2)

    class Compiled:
        permute = staticmethod(torch.compile(op.permute, fullgraph=True, backend="aot_eager"))
        unpermute = staticmethod(torch.compile(op.unpermute, fullgraph=True, backend="aot_eager"))

    with emulated():
        pairs = zip(both_ways(x, rows, weights, 8, dout), both_ways(x, rows, weights, 8, dout, Compiled), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_emulated_what_does_not_fit_is_named() -> None:
    x, rows, out = torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.int64), torch.empty(3, 8)
    run = library.operators(x)
    with emulated():
        with pytest.raises(RuntimeError, match=r"moe_combine: rows is int32, not int64"):
            run.moe_combine(x, rows.int(), None, out)
        with pytest.raises(RuntimeError, match=r"moe_combine: weights \[3\] has 3 elements, not 6"):
            run.moe_combine(x, rows, torch.ones(3), out)
        with pytest.raises(RuntimeError, match=r"moe_gather: x \[3\] is not a matrix"):
            run.moe_gather(torch.ones(3), rows, None, 2, out)
