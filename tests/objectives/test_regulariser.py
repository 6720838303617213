"""The entropy term by hand and by the laws."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.objectives.regulariser import entropy_loss
from tests.objectives.laws import check_metrics, check_poison, check_split_invariance, mean


def test_by_hand() -> None:
    entropy = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    weights = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    loss, metrics = entropy_loss(entropy, weights, denominator=5)
    assert float(loss) == -2.0
    assert mean(metrics, "entropy") == 4.0
    check_metrics(metrics)


def test_less_of_it_means_a_more_even_policy() -> None:
    logits = torch.tensor([[[2.0, 0.0, -1.0]]], requires_grad=True)
    for _ in range(300):
        log_probs = logits.log_softmax(-1)
        loss, _ = entropy_loss(-(log_probs.exp() * log_probs).sum(-1), torch.ones(1, 1), 1)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - gradient).detach().requires_grad_()
    assert math.isclose(float(loss.detach()), -math.log(3), rel_tol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 5), max_size=3))
def test_any_split_gives_the_same_gradient(seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    check_split_invariance(lambda h, w: entropy_loss(h, w, weights.sum()), [entropy], [weights], cuts)


def test_poison_under_the_mask_stays_out() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    check_poison(lambda h: entropy_loss(h, mask, 1), [torch.ones(2, 2)], mask, num_trained=1)
