"""The pure parts of the PPO loop: the worked example of core.records, the penalties, the shuffles, the controller."""

import dataclasses

import pytest
import torch

from framework.core.records import Rollout
from framework.objectives import adapt_coefficient
from framework.stages.ppo import Judged, make_experience, minibatches, next_coefficient, shaped_scores
from framework.workers.config import KlControl, PpoConfig

PPO = PpoConfig(lam=1.0, whiten_advantages=False)


def rollout() -> Rollout:
    """The worked example of core.records: prompt "7 8", response "4 9"."""
    return Rollout(
        tokens=torch.tensor([[7, 8, 4, 9, 0]]),
        token_mask=torch.tensor([[True, True, True, True, False]]),
        response_mask=torch.tensor([[False, False, True, True, False]]),
        positions=torch.tensor([[0, 1, 2, 3, 0]]),
        log_probs=torch.tensor([[0.0, 0, -1.2, -0.3, 0]]),
        policy_version=torch.zeros(1, 5, dtype=torch.int64),
        finished=torch.tensor([True]),
        row=torch.tensor([40]),
        sample=torch.tensor([0]),
    )


def judged() -> Judged:
    return Judged(
        scores=torch.tensor([1.0]),
        old_log_probs=torch.tensor([[0.0, 0, -1.2, -0.3, 0]]),
        reference_log_probs=torch.tensor([[0.0, 0, -1.0, -0.3, 0]]),
        values=torch.tensor([[0.0, 0, 0.2, 0.5, 0]]),
    )


def test_the_worked_example_of_the_records_page() -> None:
    experience, figures = make_experience(rollout(), judged(), 0.1, PPO)
    torch.testing.assert_close(experience.rewards, torch.tensor([[0.0, 0, 0.02, 1.0, 0]]))
    torch.testing.assert_close(experience.returns, torch.tensor([[0.0, 0, 1.02, 1.0, 0]]))
    torch.testing.assert_close(experience.advantages, torch.tensor([[0.0, 0, 0.82, 0.5, 0]]))
    assert figures["ppo/kl/response"] == pytest.approx(-0.2)
    assert figures["ppo/response/tokens"] == 2
    assert figures["ppo/generator_gap/max"] == 0.0


def test_a_response_that_never_stopped_pays() -> None:
    scores = shaped_scores(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), PpoConfig(missing_eos_penalty=0.7))
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.3]))


def test_the_score_is_clipped_before_the_penalty() -> None:
    scores = shaped_scores(torch.tensor([9.0]), torch.tensor([False]), PpoConfig(score_clip=2.0))
    torch.testing.assert_close(scores, torch.tensor([1.0]))


def test_minibatches_are_a_fresh_shuffle_each_epoch_and_hold_every_row_once() -> None:
    one, _ = make_experience(rollout(), judged(), 0.1, PPO)
    many = type(one).concat([one] * 12)
    many = dataclasses.replace(many, rollout=dataclasses.replace(many.rollout, row=torch.arange(12)))
    orders = []
    for iteration, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        parts = minibatches(many, 4, 0, iteration, epoch)
        assert [len(part) for part in parts] == [4, 4, 4]
        orders.append(torch.cat([part.rollout.row for part in parts]).tolist())
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


def test_the_controller_moves_only_where_the_recipe_says_so() -> None:
    assert next_coefficient(PpoConfig(), 0.15, 100.0, 64) == 0.15
    adaptive = PpoConfig(kl_control=KlControl.ADAPTIVE, kl_target=6.0, kl_horizon=10000.0)
    assert next_coefficient(adaptive, 0.15, 100.0, 64) == adapt_coefficient(0.15, 100.0, 6.0, 10000.0, 64) > 0.15
