"""GAE: by hand, against the sum over futures that defines it, gaps carried over, rows cut off."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext.gae.op import gae


def test_three_tokens_by_hand() -> None:
    """gamma 1/2, lambda 1/2. Backward: A3 = 1 - 3 = -2; A2 = 0 + 3/2 - 2 + (-2)/4 = -1; A1 = 4 + 2/2 - 1 + (-1)/4."""
    rewards, values = torch.tensor([[4.0, 0.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5)
    assert advantages.tolist() == [[3.75, -1.0, -2.0]]
    assert returns.tolist() == [[4.75, 1.0, 1.0]]


def test_a_gap_is_carried_over_and_never_read() -> None:
    """A tool's answer between two turns: the same numbers as without it, whatever stands in it."""
    nan = float("nan")
    mask = torch.tensor([[False, True, False, False, True, True, False]])
    rewards, values = (
        torch.tensor([[nan, 4.0, nan, nan, 0.0, 1.0, nan]]),
        torch.tensor([[nan, 1.0, nan, nan, 2.0, 3.0, nan]]),
    )
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0, 3.75, 0, 0, -1.0, -2.0, 0]]
    assert returns.tolist() == [[0, 4.75, 0, 0, 1.0, 1.0, 0]]


def test_a_row_that_was_cut_off_goes_on_with_its_bootstrap_value() -> None:
    """A = 1 + 0.5 * 8 - 3 = 2 for the cut row, 1 - 3 for the one that ended."""
    rewards, values = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    mask = torch.tensor([[True, False], [True, False]])
    advantages, _ = gae(rewards, values, mask, 0.5, 0.9, torch.tensor([8.0, 0.0]))
    assert advantages.tolist() == [[2.0, 0.0], [-2.0, 0.0]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_equals_the_sum_over_futures(seed: int, length: int, gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, length, generator=generator) < 0.7
    last = torch.randn(3, generator=generator, dtype=torch.float64)
    advantages, returns = gae(rewards, values, mask, gamma, lam, last)
    for row in range(3):
        places = mask[row].nonzero().flatten().tolist()
        following = [float(values[row, t]) for t in places[1:]] + [float(last[row])]
        deltas = [float(rewards[row, t]) + gamma * v - float(values[row, t]) for t, v in zip(places, following)]
        for i, t in enumerate(places):
            expected = sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[i:]))
            assert abs(float(advantages[row, t]) - expected) < 1e-12
            assert abs(float(returns[row, t]) - expected - float(values[row, t])) < 1e-12
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1))
def test_packed_sequences_are_those_of_rows_of_their_own(
    seed: int, lengths: list[int], gamma: float, lam: float
) -> None:
    generator, total = torch.Generator().manual_seed(seed), sum(lengths)
    rewards, values = torch.randn(2, 1, total, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, total, generator=generator) < 0.7
    last, ends = torch.randn(1, generator=generator, dtype=torch.float64), torch.zeros(1, total, dtype=torch.bool)
    ends[0, torch.tensor(lengths[:-1]).cumsum(0).long() - 1] = True
    packed = gae(rewards, values, mask, gamma, lam, last, ends)
    alone = []
    for number, parts in enumerate(zip(*(x.split(lengths, 1) for x in (rewards, values, mask)), strict=True)):
        alone.append(gae(*parts, gamma, lam, last if number == len(lengths) - 1 else None))
    for whole, parts in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts, 1))


def test_arguments_are_left_alone() -> None:
    rewards, values, mask = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    last = torch.ones(2)
    gae(rewards, values, mask, 0.9, 0.9, last)
    assert all((x == 1).all() for x in (rewards, values, mask, last))
