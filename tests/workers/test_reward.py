"""The judge: the class head on the last real token, normalised where the folder says so."""

from pathlib import Path

import pytest
import torch
from tiny import PLACE, generator_kwargs, policy_folder, prompts, reward_folder, spec

from framework.core.errors import UsageError
from framework.core.records import whole
from framework.models.hub import load, read_folder
from framework.workers.generator import Generator
from framework.workers.reward import Reward, normalisation


def test_scores_are_the_head_on_the_last_token_of_each_row(tmp_path: Path) -> None:
    folder, policy = reward_folder(tmp_path / "reward"), policy_folder(tmp_path / "policy")
    generator = Generator(PLACE, **generator_kwargs(policy))
    generator.load(list(load(policy).named_parameters()), version=0)
    rollout = generator.generate(prompts(5), samples=1, seed=2)

    scores = Reward(PLACE, spec(folder, optim=None)).score(rollout)

    head = read_folder(folder)[1]("class_head.weight", whole((1, 16))).double()
    model = load(folder, torch.float64)
    for b, row in enumerate(rollout.tokens):
        length = int(rollout.token_mask[b].sum())
        with torch.no_grad():
            expected = model(row[None, :length])[0, -1] @ head[0]
        assert float(scores[b]) == pytest.approx(float(expected), abs=1e-5)

    extra = {"score_mean": 0.5, "score_std": 2.0}
    normalised = Reward(PLACE, spec(reward_folder(tmp_path / "normalised", extra=extra), optim=None)).score(rollout)
    torch.testing.assert_close(normalised, (scores - 0.5) / 2.0)


def test_a_deviation_of_nothing_is_refused(tmp_path: Path) -> None:
    assert normalisation(tmp_path) == (0.0, 1.0)
    (tmp_path / "config.json").write_text('{"score_std": 0}')
    with pytest.raises(UsageError, match="score_std=0 must be positive"):
        normalisation(tmp_path)
