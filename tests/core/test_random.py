"""Philox against Random123's known answers; uniforms, normals and permutations against what they promise."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.core import random
from framework.core.runtime import num_threads

# kat_vectors of the Random123 distribution, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, result: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words(counter))
    k0, k1 = words(key)
    assert [int(word) for word in random.philox((k0, k1), (c0, c1, c2, c3))] == words(result)


def test_a_key_depends_on_seed_and_name_and_on_nothing_else() -> None:
    keys = {random.key(seed, name) for seed, name in itertools.product(range(20), ("a", "b", "layers.0.q"))}
    assert len(keys) == 60
    # Written down once: another hash would change every model ever made from a seed.
    assert random.key(0, "embedding.weight") == (0xF2B819F0, 0x9C311B27)


def test_uniforms_are_uniform() -> None:
    u = random.uniform(random.key(0, "u"), torch.arange(200_000))
    assert u.dtype == torch.float64
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    # Mean and variance have standard errors 1/√(12 n) and 1/√(180 n); four of them.
    assert abs(float(u.mean()) - 1 / 2) < 4 / math.sqrt(12 * 200_000)
    assert abs(float(u.var()) - 1 / 12) < 4 / math.sqrt(180 * 200_000)
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi_square = float(((counts - 3125) ** 2 / 3125).sum())
    assert 63 - 4 * math.sqrt(126) < chi_square < 63 + 4 * math.sqrt(126)
    neighbours = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(float(neighbours)) < 4 / math.sqrt(200_000)


def test_uniforms_use_53_bits() -> None:
    scaled = random.uniform(random.key(1, "u"), torch.arange(1000)) * 2.0**53
    assert torch.equal(scaled, scaled.round())
    assert (scaled % 2 == 1).any()


def test_each_coordinate_counts() -> None:
    key, index = random.key(0, "sampling"), torch.tensor([7])
    draws = [
        random.uniform(key, index),
        random.uniform(key, index, sample=1),
        random.uniform(key, index, position=1),
        random.uniform(key, index + 2**32),
        random.uniform(random.key(1, "sampling"), index),
    ]
    assert len({float(draw) for draw in draws}) == len(draws)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 70), st.integers(0, 69), st.integers(0, 2**31))
def test_a_draw_depends_on_its_coordinates_alone(start: int, length: int, offset: int, position: int) -> None:
    """Not on its place in a vector, the vector's length, its strides or the broadcast shape."""
    offset %= length
    key = random.key(3, "draw")
    index = torch.arange(start, start + length)
    alone = random.uniform(key, index[offset], 5, position)
    together = random.uniform(key, index, 5, position)
    strided = random.uniform(key, torch.stack([index, index]).T[:, 0], 5, position)
    grid = random.uniform(key, index[:, None], 5, torch.tensor([position, position + 1]))
    assert torch.equal(together[offset], alone)
    assert torch.equal(strided, together)
    assert torch.equal(grid[:, 0], together)
    assert torch.equal(random.normal(key, index)[offset], random.normal(key, index[offset : offset + 1])[0])


def test_threads_do_not_count() -> None:
    key, index = random.key(0, "threads"), torch.arange(100_003)
    with num_threads(1):
        one = random.normal(key, index)
    with num_threads(2):
        two = random.normal(key, index)
    assert torch.equal(one, two)


def test_normals_are_normal() -> None:
    x = random.normal(random.key(0, "n"), torch.arange(400_000))
    n = len(x)
    assert abs(float(x.mean())) < 4 / math.sqrt(n)
    assert abs(float(x.var()) - 1) < 4 * math.sqrt(2 / n) + 1e-3
    assert abs(float((x**4).mean()) - 3) < 4 * math.sqrt(96 / n) + 0.02
    assert float(x.abs().max()) < 4.01
    ordered = x.sort().values
    distance = (torch.special.ndtr(ordered) - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(distance) < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.001


def test_normals_lie_evenly_between_their_quantiles() -> None:
    """The low bits carry on where the 14 high ones, which choose the cell, leave off."""
    x = random.normal(random.key(0, "n"), torch.arange(100_000))
    q = random._quantiles(torch.device("cpu"))
    cell = torch.searchsorted(q, x, right=True) - 1
    within = (x - q[cell]) / (q[cell + 1] - q[cell])
    assert abs(float(within.mean()) - 1 / 2) < 4 / math.sqrt(12 * 100_000)
    assert abs(float(within.var()) - 1 / 12) < 4 / math.sqrt(180 * 100_000)


def test_the_table_of_quantiles_loses_less_than_a_thousandth_of_the_variance() -> None:
    q = random._quantiles(torch.device("cpu"))
    left, right = q[:-1], q[1:]
    variance = ((left**2 + left * right + right**2) / 3).mean()
    assert len(q) == 2**14 + 1
    assert torch.equal(q, -q.flip(0))
    assert abs(float(variance) - 1) < 1e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 5))
def test_shuffled_is_a_permutation(size: int, seed: int) -> None:
    order = random.shuffled(seed, "order", size, np.arange(size))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [2**31 + 11, 2**40])
def test_shuffled_needs_no_memory_for_long_streams(size: int) -> None:
    positions = np.array([0, 1, size // 2, size - 1])
    order = random.shuffled(0, "long", size, positions)
    assert len(set(order.tolist())) == 4
    assert (order >= 0).all()
    assert (order < size).all()


def test_shuffled_row_r_needs_no_other_row_and_leaves_its_argument_alone() -> None:
    positions = np.arange(1000)
    order = random.shuffled(4, "epoch", 1000, positions)
    assert np.array_equal(positions, np.arange(1000))
    assert all(random.shuffled(4, "epoch", 1000, np.array([r]))[0] == order[r] for r in (0, 13, 999))


@pytest.mark.parametrize("size", [3, 6, 8, 33])
def test_shuffled_really_shuffles(size: int) -> None:
    """Over 2000 seeds every place gets every entry, and every entry every follower, equally often (chi-square).

    Four Feistel rounds give 41 standard deviations here.
    """
    seeds = 2000
    places, followers = np.zeros((size, size)), np.zeros((size, size))
    for seed in range(seeds):
        order = random.shuffled(seed, "short", size, np.arange(size))
        places[np.arange(size), order] += 1
        followers[order[:-1], order[1:]] += 1
    others = followers[~np.eye(size, dtype=bool)]
    for counts, freedom in ((places, (size - 1) ** 2), (others, size * (size - 1) - 1)):
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_the_stream_visits_everything_once_an_epoch_and_starts_anywhere() -> None:
    stream = list(itertools.islice(random.shuffled_stream(0, "data", 10), 35))
    epochs = [stream[0:10], stream[10:20], stream[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(itertools.islice(random.shuffled_stream(0, "data", 10, start=17), 18)) == stream[17:]


def test_signs_are_fair_independent_and_a_function_of_the_place() -> None:
    index = torch.arange(1 << 16)
    drawn = random.signs(random.key(0, "w"), index)
    assert set(drawn.unique().tolist()) == {-1, 1}
    assert torch.equal(drawn[:, 77:], random.signs(random.key(0, "w"), index[77:]))
    odd = torch.tensor([5, 3, 700, 3])
    assert torch.equal(random.signs(random.key(0, "w"), odd)[:, 1], drawn[:, 3])
    assert not torch.equal(random.signs(random.key(0, "w"), index[:64] + (1 << 40)), drawn[:, :64])
    rows = torch.cat([drawn, random.signs(random.key(0, "v"), index)]).double()
    means = rows @ rows.T / len(index)
    assert (means - torch.eye(8)).abs().max() < 5 / len(index) ** 0.5  # five standard deviations
    assert rows.mean(dim=1).abs().max() < 5 / len(index) ** 0.5
    neighbours = (drawn[:, 1:] * drawn[:, :-1]).double().mean(dim=1)
    assert neighbours.abs().max() < 5 / len(index) ** 0.5
