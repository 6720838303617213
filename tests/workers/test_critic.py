"""The critic: where values stand, what they start from, and that it learns the returns."""

from pathlib import Path

import pytest
import torch
from tiny import PLACE, WIDTH, experience, generator_kwargs, policy_folder, prompts, reward_folder, spec

from framework.core.records import Rollout, whole
from framework.models.hub import load, read_folder
from framework.workers.config import PpoConfig
from framework.workers.critic import Critic
from framework.workers.generator import Generator
from framework.workers.reward import Reward

PPO = PpoConfig(value_clip=10.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return policy_folder(root / "policy"), reward_folder(root / "reward")


@pytest.fixture(scope="module")
def rollout(folders: tuple[str, str]) -> Rollout:
    generator = Generator(PLACE, **generator_kwargs(folders[0]))
    generator.load(list(load(folders[0]).named_parameters()), version=0)
    return generator.generate(prompts(4), samples=2, seed=1)


def test_a_value_is_the_head_on_the_state_before_its_token(folders: tuple[str, str], rollout: Rollout) -> None:
    critic = Critic(PLACE, spec(folders[1]), PPO)
    values = critic.values(rollout)
    head = read_folder(folders[1])[1]("class_head.weight", whole((1, 16))).double()
    model = load(folders[1], torch.float64)
    with torch.no_grad():
        states = model(rollout.tokens, document_ids=rollout.token_mask.long())
    expected = torch.zeros(len(rollout), WIDTH, dtype=torch.float64)
    for b, t in rollout.response_mask.nonzero().tolist():
        expected[b, t] = states[b, t - 1] @ head[0]
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-5)
    assert values.abs().max() > 0.1


def test_from_a_language_model_values_start_at_zero(folders: tuple[str, str], rollout: Rollout) -> None:
    assert (Critic(PLACE, spec(folders[0]), PPO).values(rollout) == 0).all()


def test_it_learns_the_returns(folders: tuple[str, str], rollout: Rollout) -> None:
    critic = Critic(PLACE, spec(folders[1]), PPO)
    reports = []
    for _ in range(30):
        values = critic.values(rollout)
        reports.append(critic.update(experience(rollout, torch.zeros_like(values), values)))
    assert reports[0]["critic/explained_variance"] < 0.1
    assert reports[-1]["critic/explained_variance"] > 0.5
    assert reports[-1]["critic/value_loss"] < reports[0]["critic/value_loss"] / 3
    assert "critic/return_square" not in reports[0]


def test_an_exported_critic_is_a_classifier_that_starts_another(folders: tuple[str, str], tmp_path: Path) -> None:
    critic = Critic(PLACE, spec(folders[1]), PPO)
    critic.export(str(tmp_path), {})
    assert Critic(PLACE, spec(str(tmp_path)), PPO).fingerprints() == critic.fingerprints()
    assert Reward(PLACE, spec(str(tmp_path), optim=None)).num_classes == 1
