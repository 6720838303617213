"""The drawn token, by hand and by the kernel on the emulator: over grids of uniforms it is the reference's."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.sampling import op, reference
from tests.cuda_ext.emulated import DTYPES, draw, emulated, same_bits, sparse

INF, NAN = math.inf, math.nan
BELOW_ONE = 1 - 2.0**-53
GRID = torch.tensor([0.0, 1e-9, 0.07, 0.2, 1 / 3, 0.5, 0.61, 0.8, 0.97, 0.99999, BELOW_ONE], dtype=torch.float64)
# temperature, top_k, top_p, min_p: each alone, at its edges, all at once.
FILTERS = [
    (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 5, 1.0, 0.0),
    (1.0, 10**6, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1e-6, 0.0), (1.0, 0, 0.999999, 0.0), (1.0, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0), (1.7, 40, 0.8, 0.02),
]  # fmt: skip


def agree(logits: Tensor, uniforms: Tensor, *filters: Any) -> None:
    """The kernel's tokens are the reference's, and so are the log-probs, to fp32."""
    got = op.sample(logits, uniforms, *filters, with_kept=True)
    tokens, log_probs, kept = reference.sample(logits, uniforms, *filters, True)
    assert got[2] is not None
    assert kept is not None
    assert torch.equal(got[0], tokens), (got[0], tokens)
    exact = (logits.double() / (filters[0] or 1.0)).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(got[1], exact.float(), rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(got[1], log_probs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got[2], kept, rtol=1e-6, atol=1e-6)


def test_two_tokens_by_hand() -> None:
    """Probabilities 1/4 and 3/4: below a quarter the first. Of three with top_k 2: the last two, 3/8 and 5/8."""
    logits = torch.tensor([[0.0, math.log(3.0)]]).expand(3, 2)
    tokens, log_probs, kept = op.sample(logits, torch.tensor([0.2, 0.25, 0.9]).double(), with_kept=True)
    assert tokens.tolist() == [0, 1, 1]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([0.25, 0.75, 0.75]))
    assert torch.equal(log_probs, kept) or torch.allclose(log_probs, kept)  # type: ignore[arg-type]
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log().expand(2, 3)
    tokens, log_probs, kept = op.sample(logits, torch.tensor([0.37, 0.38]).double(), top_k=2, with_kept=True)
    assert tokens.tolist() == [1, 2]
    assert kept is not None
    torch.testing.assert_close(log_probs.exp(), torch.tensor([0.3, 0.5]))
    torch.testing.assert_close(kept.exp(), torch.tensor([0.375, 0.625]))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_emulated_a_grid_of_uniforms_draws_the_reference_s_tokens(filters: tuple[Any, ...]) -> None:
    with emulated():
        agree((3 * draw(1, 1000, seed=1)).expand(len(GRID), -1), GRID, *filters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("filters", [FILTERS[4], FILTERS[6], FILTERS[-1]], ids=str)
def test_emulated_logits_of_sixteen_bits(filters: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Often equal, and compared by their highest bits alone."""
    with emulated():
        agree((3 * draw(1, 1000, seed=1)).to(dtype).expand(4, -1), GRID[3:7], *filters)


@pytest.mark.parametrize("size", [1, 2, 17, 2049, 50257])
def test_emulated_vocabularies_of_any_size(size: int) -> None:
    logits = 2 * draw(2, size, dtype=torch.bfloat16, seed=size)
    with emulated():
        agree(logits, GRID[4:6], 0.9, 50, 0.95, 0.001)
        agree(logits, GRID[4:6], 1.0, 0, 1.0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "filters", [(1.0, 0, 0.5, 0.0), (1.0, 3, 1.0, 0.0), (1.0, 7, 0.6, 0.9), (0.0, 0, 1.0, 0.0)], ids=str
)
def test_emulated_equals_keep_the_lower_ids(filters: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Logits of few values, all of one, of both zeros: top-k keeps every tie, top-p those that come first."""
    few = draw(1, 700, seed=2).round().clamp(-1, 1)
    same, zeros = torch.full((1, 700), -2.5), torch.tensor([0.0, -0.0]).repeat(350)[None]
    uniforms = torch.tensor([0.0, 0.3, 0.77, BELOW_ONE], dtype=torch.float64)
    with emulated():
        for logits in (few, same, zeros):
            agree(logits.to(dtype).expand(4, -1), uniforms, *filters)


def test_emulated_weights_that_are_equal_though_logits_are_not() -> None:
    """Far below the largest, neighbouring logits weigh the same 2^-48s: top-p goes by the weight, then by the id."""
    logits = torch.cat([torch.tensor([0.0]), -30 + 1e-5 * draw(300, seed=3)])[None].expand(len(GRID), -1)
    assert reference.token_weights(logits[:1], 1.0, 0, 1.0, 0.0).unique().numel() < 200
    for top_p in (0.99999999999, 1 - 2.0**-24):
        with emulated():
            agree(logits, GRID, 1.0, 0, top_p, 0.0)
            agree(logits[:, 1:], GRID, 1.0, 0, top_p / 2, 0.0)


def test_emulated_what_is_not_finite() -> None:
    """-inf is never drawn; NaN, +inf and nothing but -inf have NaN for log-probs and a token of the vocabulary."""
    rows = torch.tensor([[-INF, 1, -INF, 2], [NAN, 1, 2, 3], [INF, 1, 2, 3], [-INF] * 4, [-1e38, -1e38, 1e38, -INF]])
    for filters in ((0.5, 2, 0.9, 0.1), (0.0, 0, 1.0, 0.0), (1.0, 3, 1.0, 0.0)):
        for uniform in (0.0, BELOW_ONE):
            uniforms = torch.full((5,), uniform, dtype=torch.float64)
            with emulated():
                tokens, log_probs, kept = op.sample(rows, uniforms, *filters, with_kept=True)
                agree(rows[[0, 4]], uniforms[:2], *filters)
            assert kept is not None
            assert log_probs[1:4].isnan().all()
            assert kept[1:4].isnan().all()
            assert ((tokens >= 0) & (tokens < 4)).all()
            assert tokens[0] in (1, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_bits_depend_on_no_schedule_and_no_other_row(dtype: torch.dtype) -> None:
    logits, uniforms = draw(2, 2049, dtype=dtype, seed=4), GRID[4:6]
    words = (0.8, 500, 0.9, 0.001)
    same_bits(lambda: op.fused(logits, uniforms, *words))
    with emulated():
        whole, alone = op.fused(logits, uniforms, *words), op.fused(logits[1:], uniforms[1:], *words)
    for a, b in zip(alone, whole, strict=True):
        assert torch.equal(a[0], b[1])


def test_emulated_wherever_the_numbers_lie() -> None:
    logits, uniforms = draw(3, 1001, dtype=torch.bfloat16, seed=5), GRID[2:5]
    apart = torch.empty(3, 1024, dtype=torch.bfloat16)[:, :1001].copy_(logits)
    across = logits.t().contiguous().t()
    with emulated():
        for x in (logits, apart, across):
            agree(x, uniforms, 1.0, 0, 0.9, 0.0)
        assert op.fused(logits[:0], uniforms[:0], 1.0, 0, 1.0, 0.0)[0].shape == (0,)


def test_emulated_beyond_two_to_the_31st() -> None:
    rows, size = 32769, 65536
    logits = sparse(rows, size, dtype=torch.bfloat16)
    logits[-1] = draw(size, dtype=torch.bfloat16, seed=6)
    uniforms = torch.full((rows,), 0.4, dtype=torch.float64)
    with emulated(first_block=rows - 1):
        tokens, log_probs, _ = op.fused(logits, uniforms, 1.0, 0, 0.9, 0.0)
    true, exact, _ = reference.sample(logits[-1:], uniforms[-1:], 1.0, 0, 0.9, 0.0, False)
    assert tokens[-1] == true[0]
    torch.testing.assert_close(log_probs[-1:], exact)


def test_emulated_torch_finds_nothing_wrong_with_the_operator() -> None:
    logits = draw(3, 8)
    with emulated():
        torch.library.opcheck(
            op.fused, (logits, GRID[:3], 1.0, 2, 0.9, 0.0), test_utils=("test_schema", "test_faketensor")
        )
        compiled = torch.compile(lambda x: op.sample(x * 2, GRID[:3])[:2], fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(logits), op.sample(logits * 2, GRID[:3])[:2], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits": torch.ones(3, 8).double()}, "logits is float64, not float32, bfloat16 or float16"),
        ({"logits": torch.ones(8)}, r"logits \[8\] has 1 dimensions, not 2"),
        ({"logits": torch.ones(3, 0)}, r"logits \[3,0\]: rows of 1 to 2\^31 - 1 are needed"),
        ({"logits": torch.ones(8, 3).t()}, r"logits \[3,8\] has stride 3 in dimension 1: rows must be contiguous"),
        ({"uniforms": torch.ones(3)}, "uniforms is float32, not float64"),
        ({"uniforms": torch.ones(2).double()}, r"uniforms \[2\] has 2 elements, not 3"),
        ({"temperature": -1.0}, "temperature is -1: it must not be negative"),
        ({"top_k": -1}, "top_k is -1: it must not be negative"),
        ({"top_p": 0.0}, r"top_p is 0, not in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p is 1.5, not in \[0, 1\]"),
    ],
)
def test_emulated_what_does_not_fit_is_named(change: dict[str, object], says: str) -> None:
    arguments = {
        "logits": torch.ones(3, 8), "uniforms": GRID[:3], "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    } | change  # fmt: skip
    out = torch.empty(3, dtype=torch.int64), torch.empty(3), torch.empty(3)
    with emulated(), pytest.raises(RuntimeError, match="sampling_draw: " + says):
        library.operators(torch.ones(1)).sampling_draw(*arguments.values(), *out)
