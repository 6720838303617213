"""Sums and weights add up; means are taken once."""

import torch

from framework.engine.metrics import means, merge, reduce_over
from framework.parallel.collectives import Ranks


def pair(total: float, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(total), torch.tensor(weight)


def test_a_mean_of_unequal_parts_is_weighted() -> None:
    merged = merge(merge({}, {"loss": pair(6.0, 2)}), {"loss": pair(1.0, 8), "accuracy": pair(3.0, 4)})
    assert means(merged) == {"loss": 0.7, "accuracy": 0.75}


def test_what_nothing_counted_towards_is_left_out() -> None:
    assert means({"loss": pair(0.0, 0), "kl": pair(1.0, 2)}) == {"kl": 0.5}


def test_metrics_leave_the_graph_and_add_up_in_fp64() -> None:
    loss = torch.tensor(1.0, requires_grad=True)
    total, _ = merge({}, {"loss": (loss * 2, torch.tensor(1))})["loss"]
    assert not total.requires_grad
    tiny = merge(merge({}, {"x": pair(1.0, 1)}), {"x": pair(1e-9, 1)})
    assert float(tiny["x"][0]) > 1.0


def test_one_rank_reduces_to_itself() -> None:
    reduced = reduce_over(Ranks(None), merge({}, {"b": pair(2.0, 1), "a": pair(1.0, 4)}))
    assert means(reduced) == {"a": 0.25, "b": 2.0}
    assert reduce_over(Ranks(None), {}) == {}
