"""Shares hold at every moment; each source goes through its own epochs; the mixture obeys law Order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.core.errors import UsageError
from framework.data.config import DataConfig
from framework.data.loader import Loader
from framework.data.mixture import Mixture, open_parts, tempered
from tests.data.test_loader import Numbered, Pairs

SIZES = (3, 50, 7)  # rows of three sources


def mixture(weights: list[float], sizes: tuple[int, ...] = SIZES) -> Mixture:
    return Mixture([Numbered(size) for size in sizes], weights)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5), st.integers(1, 2500))
def test_shares_hold_at_every_moment(weights: list[float], count: int) -> None:
    """Over n rows no source is off its share by more than the number of sources, and half a thousandth of n."""
    mixed = mixture(weights, (5000,) * len(weights))
    source = mixed.order(0, np.arange(count)) // 5000
    given_rows = np.bincount(source, minlength=len(weights))
    expected = np.array(weights) / sum(weights) * count
    assert np.abs(given_rows - expected).max() <= len(weights) + 0.001 * count


def test_three_to_one_by_hand() -> None:
    source = mixture([3.0, 1.0], (10, 10)).order(0, np.arange(8)) // 10
    assert source.tolist() == [0, 0, 1, 0, 0, 0, 1, 0]


def test_within_a_percentage_point_over_a_long_run() -> None:
    index = mixture([0.7, 0.2, 0.1]).order(3, np.arange(10_000))
    source = np.searchsorted(np.cumsum(SIZES), index, side="right")
    assert np.abs(np.bincount(source) / 100 - [70, 20, 10]).max() < 0.01


def test_each_source_has_epochs_of_its_own() -> None:
    index = mixture([0.5, 0.3, 0.2]).order(1, np.arange(300))
    starts = np.cumsum([0, *SIZES])
    for s, size in enumerate(SIZES):
        mine = (index[(index >= starts[s]) & (index < starts[s + 1])] - starts[s]).tolist()
        whole = len(mine) // size * size
        assert whole >= size
        for start in range(0, whole, size):
            assert sorted(mine[start : start + size]) == list(range(size))


def test_order_is_a_pure_function_of_the_position() -> None:
    mixed = mixture([0.5, 0.3, 0.2])
    positions = np.array([4000, 3, 999, 1000, 3])
    one_by_one = [int(mixed.order(5, np.array([p]))[0]) for p in positions]
    assert mixed.order(5, positions).tolist() == one_by_one
    assert mixed.order(6, np.arange(50)).tolist() != mixed.order(5, np.arange(50)).tolist()


def test_rows_come_in_the_order_asked_and_the_loader_follows_the_mixture() -> None:
    mixed = mixture([0.5, 0.3, 0.2])
    assert mixed.rows(np.array([55, 0, 10, 2, 59])).tokens[:, 0].tolist() == [3, 1, 8, 3, 7]
    drawn = [Loader(mixed, 4, 9, rank, 2).batch(3).tokens[:, 0].tolist() for rank in (0, 1)]
    index = mixed.order(9, np.arange(12, 16))
    assert drawn[0] + drawn[1] == mixed.rows(index).tokens[:, 0].tolist()
    assert len(mixed) == 60


def test_pairs_with_and_without_margins_mix() -> None:
    class Plain(Pairs):
        def rows(self, index):  # type: ignore[no-untyped-def]
            batch = super().rows(index)
            return type(batch)(batch.chosen, batch.rejected)

    batch = Mixture([Pairs(2), Plain(2)], [1, 1]).rows(np.array([3, 1, 0]))
    assert torch.equal(batch.margin, torch.tensor([0.0, 2.0, 1.0]))


def test_counts_add_up() -> None:
    parts = [
        Numbered(1, skipped={"a": 1}, num_tokens=2, num_bytes=3),
        Numbered(1, skipped={"a": 1, "b": 4}, num_tokens=5),
    ]
    mixed = Mixture(parts, [1, 1])
    assert (mixed.skipped, mixed.num_tokens, mixed.num_bytes) == ({"a": 2, "b": 4}, 7, 3)


def test_weights_of_a_recipe_make_a_mixture_of_the_training_part_alone() -> None:
    config = DataConfig(train=["a", "b"], weights=[3.0, 1.0])
    opened: list[list[str]] = []

    def open_one(config: DataConfig) -> Numbered:
        opened.append(config.train)
        return Numbered(2)

    assert isinstance(open_parts(config, "train", open_one), Mixture)
    assert isinstance(open_parts(config, "valid", open_one), Numbered)
    assert opened == [["a"], ["b"], ["a", "b"]]


def test_weights_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="the least is below one in 1000 rows"):
        mixture([1.0, 1e-6], (2, 2))
    with pytest.raises(UsageError, match=r"data\.weights has 1 entries and data\.train 2"):
        DataConfig(train=["a", "b"], weights=[1.0])
    with pytest.raises(UsageError, match=r"data\.weights=\[1\.0, 0\.0\] must all be positive"):
        DataConfig(train=["a", "b"], weights=[1.0, 0.0])


def test_a_source_drops_out_at_its_cap_and_the_others_share_the_rest() -> None:
    """Sizes 3, 50, 7; at most 2, 1 and 3 epochs: 6 + 50 + 21 rows, then the stream ends."""
    mixed = Mixture([Numbered(size) for size in SIZES], [0.5, 0.3, 0.2], [2, 1, 3])
    assert mixed.available == 77
    index = mixed.order(4, np.arange(77))
    source = np.searchsorted(np.cumsum(SIZES), index, side="right")
    assert np.bincount(source).tolist() == [6, 50, 21]
    first_gone = np.flatnonzero(source == 0)[-1] + 1  # after some 12 rows; from then on 3 to 2
    both = np.bincount(source[first_gone : first_gone + 50], minlength=3)
    assert np.abs(both - [0, 30, 20]).max() <= 1
    assert sorted(index[source == 0].tolist()) == [0, 0, 1, 1, 2, 2]
    one_by_one = [int(mixed.order(4, np.array([p]))[0]) for p in range(77)]
    assert one_by_one == index.tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.floats(0.3, 4.0)), min_size=2, max_size=4), st.integers(0, 9))
def test_caps_are_exact_whatever_the_sizes(sources: list[tuple[int, float]], seed: int) -> None:
    sizes, caps = [size for size, _ in sources], [cap for _, cap in sources]
    most = [int(np.floor(size * cap)) for size, cap in sources]
    if not any(most):
        return
    mixed = Mixture([Numbered(size) for size in sizes], [1.0] * len(sizes), caps)
    index = mixed.order(seed, np.arange(sum(most)))
    assert mixed.available == sum(most)
    assert np.bincount(np.searchsorted(np.cumsum(sizes), index, side="right"), minlength=len(sizes)).tolist() == most


def test_temperature_by_hand_and_over_many_rows() -> None:
    assert tempered([100, 1], 2) == pytest.approx([10 / 11, 1 / 11])
    assert tempered([30, 10], 1) == pytest.approx([0.75, 0.25])
    assert tempered([30, 10], float("inf")) == [0.5, 0.5]
    sizes = [90_000, 9_000, 1_000]
    mixed = mixture(tempered(sizes, 3), tuple(sizes))
    source = np.searchsorted(np.cumsum(sizes), mixed.order(0, np.arange(100_000)), side="right")
    roots = np.cbrt(sizes)
    assert np.abs(np.bincount(source) / 1e5 - roots / roots.sum()).max() < 0.01


def test_caps_and_temperature_of_a_recipe_make_a_mixture() -> None:
    opened = open_parts(DataConfig(train=["a", "b"], max_epochs=[2.0]), "train", lambda config: Numbered(4))
    assert isinstance(opened, Mixture)
    assert opened.available == 16
    with pytest.raises(
        UsageError, match=r"the run takes 20 rows and data\.max_epochs allows 16; shorten it to 4 steps"
    ):
        Loader(opened, 4, 0).require(5)
    flat = open_parts(DataConfig(train=["a", "b"], temperature=5.0), "train", lambda config: Numbered(4))
    assert isinstance(flat, Mixture)
    for words in ({"temperature": -1.0}, {"temperature": 1.0, "weights": [1.0, 1.0]}, {"max_epochs": [1.0, 2.0, 3.0]}):
        with pytest.raises(UsageError, match=r"data\.(temperature|max_epochs)="):
            DataConfig(train=["a", "b"], **words)  # type: ignore[arg-type]
