"""GAE's kernel on the emulator: against the definition in fp64, gaps, rows cut off, schedules, sizes, bad input."""

import pytest
import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.gae import benchmark, op, reference
from tests.cuda_ext.emulated import chance, draw, emulated, no_worse_than, rounded_once, same_bits, shifted, sparse

# One position, a pack, a warp and one more, several warps with packs and without, several tiles of a full block.
SHAPES = [(1, 1), (3, 4), (2, 33), (5, 256), (3, 1001), (2, 2560), (1, 1537)]


def inputs(rows: int, length: int, counting: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values, mask; what does not count is NaN."""
    mask = chance(rows, length, seed=3) < counting
    nan = torch.tensor(torch.nan)
    rewards, values = (torch.where(mask, draw(rows, length, seed=seed), nan) for seed in (1, 2))
    return rewards, values, mask


def exact(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, last: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    bootstrap_values = None if last is None else last.double()
    return reference.gae(rewards.double(), values.double(), mask, gamma, lam, bootstrap_values)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.5, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_it_equals_the_definition(shape: tuple[int, int], gamma: float, lam: float) -> None:
    rewards, values, mask = inputs(*shape)
    last = draw(shape[0], seed=4)
    with emulated(seed=sum(shape)):
        got = op.gae(rewards, values, mask, gamma, lam, last)
    theirs = reference.gae(rewards, values, mask, gamma, lam, last)
    for ours, eager, true in zip(got, theirs, exact(rewards, values, mask, gamma, lam, last), strict=True):
        rounded_once(ours, true, sums=2.0**-20)
        no_worse_than(eager, ours, true)
        assert (ours[~mask] == 0).all()


@pytest.mark.parametrize("counting", [0.0, 0.02, 1.0])
def test_emulated_long_gaps_rows_where_nothing_counts_and_rows_where_all_does(counting: float) -> None:
    rewards, values, mask = inputs(4, 1600, counting)
    mask[1], mask[2, :1599] = False, False
    with emulated():
        got = op.gae(rewards, values, mask, 0.99, 0.95)
    for ours, true in zip(got, exact(rewards, values, mask, 0.99, 0.95), strict=True):
        rounded_once(ours, true, sums=2.0**-20)
        assert (ours[1] == 0).all()


def test_emulated_a_row_that_was_cut_off_goes_on_with_its_bootstrap_value() -> None:
    """By hand, gamma 1/2: A = 1 + 0.5 * 8 - 3 = 2 for the cut row, 1 - 3 for the one that ended."""
    rewards, values = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    mask = torch.tensor([[True, False], [True, False]])
    with emulated():
        advantages, returns = op.gae(rewards, values, mask, 0.5, 0.9, torch.tensor([8.0, 0.0]))
    assert advantages.tolist() == [[2.0, 0.0], [-2.0, 0.0]]
    assert returns.tolist() == [[5.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("often", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_packed_sequences_know_nothing_of_each_other(shape: tuple[int, int], often: float) -> None:
    rewards, values, mask = inputs(*shape)
    ends = chance(*shape, seed=5) < often
    last = draw(shape[0], seed=4)
    with emulated(seed=sum(shape)):
        got = op.gae(rewards, values, mask, 0.99, 0.95, last, ends)
    exact = reference.gae(rewards.double(), values.double(), mask, 0.99, 0.95, last.double(), ends)
    theirs = reference.gae(rewards, values, mask, 0.99, 0.95, last, ends)
    for ours, eager, true in zip(got, theirs, exact, strict=True):
        rounded_once(ours, true, sums=2.0**-20)
        no_worse_than(eager, ours, true)


def test_emulated_bits_depend_on_no_schedule() -> None:
    rewards, values, mask = inputs(5, 1284)
    ends = chance(5, 1284, seed=5) < 0.01
    same_bits(lambda: op.gae(rewards, values, mask, 0.99, 0.95, None, ends))


def test_emulated_a_row_depends_on_no_other_row() -> None:
    rewards, values, mask = inputs(5, 643)
    with emulated():
        whole = op.gae(rewards, values, mask, 0.99, 0.95)
        alone = op.gae(rewards[3:4], values[3:4], mask[3:4], 0.99, 0.95)
    for a, b in zip(alone, whole, strict=True):
        assert torch.equal(a[0], b[3])


def test_emulated_wherever_the_numbers_lie() -> None:
    rewards, values, mask = inputs(3, 320)
    apart = rewards.t().contiguous().t(), torch.stack([values, values], -1)[..., 0], mask
    last = draw(3, 2, seed=4)[:, 0]
    with emulated():
        plain = op.gae(rewards, values, mask, 0.99, 0.95, last)
        for form in ((shifted(rewards), values, mask), (rewards, values, shifted(mask)), apart):
            for a, b in zip(op.gae(*form, 0.99, 0.95, last), plain, strict=True):
                torch.testing.assert_close(a, b)  # added up in another order


def test_emulated_nothing_at_all_and_what_is_not_a_number() -> None:
    """A NaN that counts reaches whatever comes before it in its row, and nothing else."""
    with emulated():
        for shape in ((0, 8), (3, 0)):
            empty = torch.empty(shape)
            assert all(x.shape == shape for x in op.gae(empty, empty, empty.bool(), 0.9, 0.9))
        rewards, values = torch.zeros(2, 100), torch.zeros(2, 100)
        rewards[0, 60] = torch.nan
        advantages, returns = op.gae(rewards, values, torch.ones(2, 100, dtype=torch.bool), 0.9, 0.9)
    for x in (advantages, returns):
        assert x[0, :61].isnan().all()
        assert (x[0, 61:] == 0).all()
        assert (x[1] == 0).all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("length", [64, 256, 5000])
def test_emulated_what_is_not_finite_ends_with_its_sequence(length: int, bad: float) -> None:
    """Wherever in a thread's stretch, a warp or a tile the end of the sequence before it lies."""
    rewards, values = torch.zeros(3, length), torch.zeros(3, length)
    ends, mask = torch.zeros(3, length, dtype=torch.bool), torch.ones(3, length, dtype=torch.bool)
    for row, end in enumerate((length // 2 - 1, length // 2 + 2, length - 2)):
        ends[row, end], rewards[row, end + 1] = True, bad
    with emulated():
        got = op.gae(rewards, values, mask, 0.9, 0.9, None, ends)
    for ours, theirs in zip(got, reference.gae(rewards, values, mask, 0.9, 0.9, None, ends), strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert int((~ours.isfinite()).sum()) == 3


def test_emulated_beyond_two_to_the_31st() -> None:
    """Only the last of 2^15 + 1 rows of 2^16 runs."""
    shape = (2**15 + 1, 2**16)
    rewards, values, advantages, returns = (sparse(*shape, dtype=torch.float32) for _ in range(4))
    mask = sparse(*shape, dtype=torch.uint8).view(torch.bool)
    row = inputs(1, 2**16)
    for x, last in zip((rewards, values, mask), row, strict=True):
        x[-1:] = last
    with emulated(first_block=shape[0] - 1):
        library.operators(rewards).gae_forward(rewards, values, mask, None, None, 0.99, 0.95, advantages, returns)
    with emulated():
        alone = op.gae(*row, 0.99, 0.95)
    assert torch.equal(advantages[-1:], alone[0])
    assert torch.equal(returns[-1:], alone[1])


def test_emulated_other_dtypes_and_gradients_are_the_reference_s() -> None:
    rewards, values, mask = (x[:, :5].nan_to_num() for x in inputs(2, 8))
    with emulated():
        advantages, _ = op.gae(rewards.bfloat16(), values.bfloat16(), mask, 0.9, 0.9)
        assert advantages.dtype == torch.bfloat16
        advantages, _ = op.gae(rewards, values.requires_grad_(), mask, 0.9, 0.9)
        assert torch.autograd.grad(advantages.sum(), values)[0].abs().sum() > 0
        with torch.no_grad():
            assert not op.gae(rewards, values, mask, 0.9, 0.9)[0].requires_grad


def test_emulated_torch_finds_nothing_wrong_with_the_operator() -> None:
    rewards, values, mask = inputs(2, 8, counting=1.0)
    with emulated():
        torch.library.opcheck(op.fused, (rewards, values, mask, 0.9, 0.9, None))
        torch.library.opcheck(op.fused, (rewards, values, mask, 0.9, 0.9, draw(2), mask))


def test_emulated_it_stays_in_a_compiled_graph() -> None:
    def advantages_of(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return op.gae(rewards * 2, values, mask, 0.9, 0.9)[0] + 1

    given = inputs(2, 8)
    with emulated():
        compiled = torch.compile(advantages_of, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*given), advantages_of(*given))


def test_emulated_the_benchmark_s_sides_agree() -> None:
    with emulated():
        for case in benchmark.cases("cpu", sizes=[(3, 20)]):
            for a, b in zip(case.ours(), case.rivals["eager"](), strict=True):  # type: ignore[call-overload]
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rewards": torch.ones(6)}, r"rewards \[6\] is not \[B,T\]"),
        ({"rewards": torch.ones(2, 3).half()}, "rewards is float16, not float32"),
        ({"values": torch.ones(3, 2)}, r"values is float32 \[3,2\] beside rewards of float32 \[2,3\]"),
        ({"values": torch.ones(3, 2).t()}, r"values \[2,3\] has stride 2 in dimension 1, not 1"),
        ({"mask": torch.ones(2, 3)}, "mask is float32, not bool"),
        ({"mask": torch.ones(3, 2).bool()}, r"mask \[3,2\] is not of the shape of rewards \[2,3\]"),
        ({"ends": torch.ones(2, 4).bool()}, r"ends \[2,4\] is not of the shape of rewards \[2,3\]"),
        ({"bootstrap_values": torch.ones(3)}, r"bootstrap_values \[3\] has 3 elements, not 2"),
        ({"returns": torch.ones(2, 4)}, r"returns is float32 \[2,4\] beside rewards of float32 \[2,3\]"),
    ],
)
def test_emulated_what_does_not_fit_is_named(change: dict[str, Tensor], says: str) -> None:
    arguments = {
        "rewards": torch.ones(2, 3), "values": torch.ones(2, 3), "mask": torch.ones(2, 3).bool(),
        "ends": None, "bootstrap_values": None, "gamma": 0.9, "lam": 0.9,
        "advantages": torch.ones(2, 3), "returns": torch.ones(2, 3),
    }  # fmt: skip
    with emulated(), pytest.raises(RuntimeError, match="gae_forward: " + says):
        library.operators(torch.ones(1)).gae_forward(*(arguments | change).values())
