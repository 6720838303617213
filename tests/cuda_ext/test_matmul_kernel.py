"""Every rung of the ladder: one product, one test."""

import pytest
import torch

from cuda_ext import library
from cuda_ext.matmul import reference
from cuda_ext.matmul.benchmark import hopper
from cuda_ext.matmul.op import RUNGS, fused, matmul
from tests.cuda_ext.emulated import DEVICE, draw, emulated, no_worse_than, rounded_once, same_bits, shifted, sparse

CASES = [(rung, torch.float32) for rung in RUNGS[:5]]
CASES += [(rung, dtype) for rung in ("tiles", "ahead", "tensor") for dtype in (torch.bfloat16, torch.float16)]
SIZES = [(1, 1, 1), (5, 7, 3), (33, 130, 17), (129, 64, 40), (128, 256, 64)]
HOPPER = [(rung, dtype) for rung in RUNGS[6:] for dtype in (torch.bfloat16, torch.float16)]
needs_hopper = pytest.mark.skipif(not hopper(DEVICE), reason="this card is not of compute capability 9.0")
WHOLE = [(1, 8, 8), (33, 136, 72), (130, 264, 456), (300, 520, 200)]  # rows of whole sixteens of bytes, as TMA wants


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("rung", "dtype"), CASES, ids=str)
def test_emulated_against_fp64(rung: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    against_fp64(rung, dtype, size)


@needs_hopper
@pytest.mark.parametrize("size", WHOLE, ids=str)
@pytest.mark.parametrize(("rung", "dtype"), HOPPER, ids=str)
def test_emulated_hopper_against_fp64(rung: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Stages, tiles and blocks in all numbers: up to 8 steps in a ring of 3 or 4, 9 tiles for 3 blocks that stay."""
    against_fp64(rung, dtype, size)


@needs_hopper
def test_emulated_tiles_in_bands_are_all_made_and_once() -> None:
    against_fp64("specialised", torch.bfloat16, (2180, 264, 8))  # 18 by 2: a band of 16, and one of 2


def against_fp64(rung: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    m, n, k = size
    a, b = draw(m, k, dtype=dtype), draw(k, n, dtype=dtype, seed=1)
    exact = a.double() @ b.double()
    with emulated(seed=m):
        got = matmul(a, b, rung)
    rounded_once(got, exact, sums=2.0**-21 * k**0.5)
    no_worse_than(a @ b, got, exact, times=1.1 if dtype != torch.float32 else 2.0)  # torch sums in blocks of its own


@pytest.mark.parametrize(
    ("rung", "dtype"), [("tiles", torch.float32), ("ahead", torch.float32), ("tensor", torch.float16)]
)
def test_emulated_bits_depend_on_no_schedule(rung: str, dtype: torch.dtype) -> None:
    a, b = draw(130, 70, dtype=dtype), draw(70, 40, dtype=dtype, seed=1)
    same_bits(lambda: (matmul(a, b, rung),))


@needs_hopper
@pytest.mark.parametrize("rung", RUNGS[6:])
def test_emulated_bits_depend_on_no_order_of_arrival(rung: str) -> None:
    a, b = draw(130, 328, dtype=torch.bfloat16), draw(328, 40, dtype=torch.bfloat16, seed=1)
    same_bits(lambda: (matmul(a, b, rung),))


def test_emulated_wherever_the_numbers_lie_and_whatever_they_are() -> None:
    a, b = draw(128, 64, dtype=torch.bfloat16), draw(64, 128, dtype=torch.bfloat16, seed=1)
    with emulated():
        plain = matmul(a, b, "tensor")
        assert torch.equal(plain, matmul(shifted(a), shifted(b), "tensor"))
        assert torch.equal(plain, matmul(a.t().contiguous().t(), b, "tensor"))
        assert matmul(a[:0], b).shape == (0, 128)
        assert matmul(a[:, :0], b[:0]).eq(0).all()
        a[3, 5] = torch.nan
        broken = matmul(a, b, "tensor")
    assert broken[3].isnan().all()
    assert broken[4].isfinite().all()


@needs_hopper
@pytest.mark.parametrize("rung", RUNGS[6:])
def test_emulated_hopper_keeps_nan_in_its_row_and_takes_what_is_empty(rung: str) -> None:
    a, b = draw(70, 24, dtype=torch.float16), draw(24, 16, dtype=torch.float16, seed=1)
    with emulated():
        assert matmul(a[:0], b, rung).shape == (0, 16)
        assert matmul(a, b[:, :0], rung).shape == (70, 0)
        assert matmul(a[:, :0], b[:0], rung).eq(0).all()
        a[3, 5], a[66, 23] = torch.nan, torch.inf
        c = matmul(a, b, rung)
    assert (~c.isfinite()).any(1).nonzero().flatten().tolist() == [3, 66]
    assert c[3].isnan().all()


@pytest.mark.parametrize(("rung", "deep"), [("tensor", 1), pytest.param("wgmma", 8, marks=needs_hopper)])
def test_emulated_beyond_two_to_the_31st(rung: str, deep: int) -> None:
    """The last block of a `c` with 2^31 + 2^16 numbers; of integers, so that any order of a sum gives its bits."""
    a, b = (draw(*shape, dtype=torch.bfloat16).round() for shape in ((32769, deep), (deep, 65536)))
    blocks = -(-32769 // 128) * (65536 // 128)
    c = sparse(32769, 65536, dtype=torch.bfloat16)
    with emulated(first_block=blocks - 1):
        library.operators(a).matmul(RUNGS.index(rung), a, b, c)
    assert torch.equal(c[-1, -128:], reference.matmul(a[-1:], b)[0, -128:])
    assert c[-1, -128:].any()


def test_emulated_torch_finds_nothing_wrong_with_the_operator() -> None:
    with emulated():
        torch.library.opcheck(fused, (draw(3, 4), draw(4, 5), 2))


def test_emulated_what_does_not_fit_is_named() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with emulated():
        with pytest.raises(RuntimeError, match=r"matmul: a \[3,4\] and b \[5,4\] are not \[M,K\] and \[K,N\]"):
            fused(a, torch.ones(5, 4), 0)
        with pytest.raises(RuntimeError, match=r"matmul: b is float16, not float32"):
            fused(a, b.half(), 0)
        with pytest.raises(RuntimeError, match=r"matmul: rung 5 is not there: 0 to 4 for float32"):
            matmul(a, b, "tensor")
        with pytest.raises(RuntimeError, match=r"matmul: rung 6 is not there: 0 to 4 for float32"):
            matmul(a, b, "wgmma")
        with pytest.raises(ValueError, match="rung cutlass is not there: choose one of naive, coalesced"):
            matmul(a, b, "cutlass")


@needs_hopper
@pytest.mark.parametrize("rung", RUNGS[6:])
def test_emulated_what_tma_cannot_take_is_named(rung: str) -> None:
    a, b = (draw(8, 8, dtype=torch.float16) for _ in range(2))
    with emulated():
        with pytest.raises(RuntimeError, match=r"matmul: a \[8,4\] has rows of 8 bytes: TMA takes multiples of 16"):
            matmul(a[:, :4], b[:4], rung)
        with pytest.raises(RuntimeError, match=r"matmul: b \[8,7\] has rows of 14 bytes: TMA takes multiples of 16"):
            matmul(a, b[:, :7], rung)
        with pytest.raises(RuntimeError, match=r"matmul: a begins at 0x[0-9a-f]+: TMA takes multiples of 16"):
            matmul(shifted(a), b, rung)
        with pytest.raises(RuntimeError, match=r"matmul: c begins at 0x[0-9a-f]+, not at a multiple of 16"):
            library.operators(a).matmul(RUNGS.index(rung), a, b, shifted(a))


def test_the_reference_is_torch_s_product() -> None:
    a, b = draw(5, 6), draw(6, 7, seed=1)
    assert torch.equal(reference.matmul(a, b), a @ b)
    assert torch.equal(reference.matmul(a.half(), b.half()), (a.half().float() @ b.half().float()).half())


def test_emulated_it_stays_in_a_compiled_graph() -> None:
    a, b = draw(3, 4), draw(4, 5, seed=1)
    with emulated():
        assert torch.equal(
            torch.compile(matmul, fullgraph=True, backend="aot_eager")(a, b, "tiles"), matmul(a, b, "tiles")
        )
