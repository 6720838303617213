"""Losses of sequences by hand and against torch's own."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from framework.objectives.classification import classification_loss, regression_loss
from tests.objectives.laws import check_metrics, check_split_invariance, mean


def test_classes_by_hand() -> None:
    """Softmaxes (3/4, 1/4) and (1/2, 1/2), and a tie, which goes to the first."""
    logits = torch.tensor([[math.log(3), 0.0], [2.0, 2.0], [0.0, math.log(3)]])
    loss, metrics = classification_loss(logits, torch.tensor([0, 1, 0]), num_sequences=6)
    total = math.log(4 / 3) + math.log(2) + math.log(4)
    assert float(loss) == pytest.approx(total / 6)
    assert mean(metrics, "loss") == pytest.approx(total / 3)
    assert mean(metrics, "accuracy") == pytest.approx(1 / 3)
    check_metrics(metrics)


def test_numbers_by_hand() -> None:
    loss, metrics = regression_loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.0]), num_sequences=4)
    assert float(loss) == (1 + 9) / 4
    assert (mean(metrics, "loss"), mean(metrics, "absolute_error")) == (5.0, 2.0)
    check_metrics(metrics)


def test_as_torch_has_them_in_value_and_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=random, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (7,), generator=random)
    targets = torch.randn(7, generator=random, dtype=torch.float64)
    pairs = [
        (classification_loss(logits, labels, 7)[0], cross_entropy(logits, labels)),
        (regression_loss(logits[:, 0], targets, 7)[0], mse_loss(logits[:, 0], targets)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_any_split_of_a_batch_gives_the_same() -> None:
    random = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(6, 3, generator=random), torch.randint(3, (6,), generator=random)
    check_split_invariance(lambda x, y: classification_loss(x, y, 6), [logits], [labels], [1, 4])
    values, targets = torch.randn(2, 6, generator=random)
    check_split_invariance(lambda x, y: regression_loss(x, y, 6), [values], [targets], [2])
