"""Every rung of the ladder: one product, one test."""

import pytest
import torch

from cuda_ext import library
from cuda_ext.matmul import reference
from cuda_ext.matmul.op import RUNGS, fused, matmul
from tests.cuda_ext.emulated import draw, emulated, no_worse_than, rounded_once, same_bits, shifted, sparse

CASES = [(rung, torch.float32) for rung in RUNGS[:5]]
CASES += [(rung, dtype) for rung in ("tiles", "ahead", "tensor") for dtype in (torch.bfloat16, torch.float16)]
SIZES = [(1, 1, 1), (5, 7, 3), (33, 130, 17), (129, 64, 40), (128, 256, 64)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("rung", "dtype"), CASES, ids=str)
def test_emulated_against_fp64(rung: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
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


def test_emulated_beyond_two_to_the_31st() -> None:
    """The last block of a `c` with 2^31 + 2^16 numbers."""
    a, b = draw(32769, 1, dtype=torch.bfloat16), draw(1, 65536, dtype=torch.bfloat16, seed=1)
    blocks = -(-32769 // 128) * (65536 // 128)
    c = sparse(32769, 65536, dtype=torch.bfloat16)
    with emulated(first_block=blocks - 1):
        library.operators(a).matmul(RUNGS.index("tensor"), a, b, c)
    assert torch.equal(c[-1, -128:], (a[-1] * b[0])[-128:])


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
        with pytest.raises(ValueError, match="rung wgmma is not there: choose one of naive, coalesced"):
            matmul(a, b, "wgmma")


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
