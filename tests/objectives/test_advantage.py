"""GAE, whitening and group baselines: by hand, against loops in float64, the published vector, and trl's trainers."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from framework.core.errors import UsageError
from framework.core.registry import lookup, names
from framework.objectives.advantage import gae, group_advantages, whiten
from tests.objectives.laws import TRL_ON_CPU


def test_gae_by_hand() -> None:
    """γ = 1/2, λ = 1/2; the row's response is its middle two tokens: δ = 1 + ½·4 - 2 = 1 and 3 - 4 = -1."""
    rewards = torch.tensor([[7.0, 1.0, 3.0, 7.0]])
    values = torch.tensor([[7.0, 2.0, 4.0, 7.0]])
    mask = torch.tensor([[False, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0, 0.75, -1, 0]]
    assert returns.tolist() == [[0, 2.75, 3, 0]]
    # Cut off where the value would have been 6: δ of the last token becomes 3 + ½·6 - 4 = 2.
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.5, bootstrap_values=torch.tensor([6.0]))
    assert advantages.tolist() == [[0, 1.5, 2, 0]]


def brute_force_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A_t = Σ_k (γλ)^k δ_{t+k} as a double sum over the response tokens of a row, nothing recursive."""
    advantages = torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        steps = [t for t in range(rewards.shape[1]) if mask[b, t]]
        r = [float(rewards[b, t]) for t in steps]
        v = [*(float(values[b, t]) for t in steps), 0.0 if bootstrap is None else float(bootstrap[b])]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(steps))]
        for i, t in enumerate(steps):
            advantages[b, t] = sum((gamma * lam) ** k * deltas[i + k] for k in range(len(steps) - i))
    return advantages, (advantages + values) * mask


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 7), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_gae_against_a_double_sum(seed: int, rows: int, length: int, gamma: float, lam: float, cut_off: bool) -> None:
    """Any mask, gaps included; poison outside it changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    bootstrap = torch.randn(rows, generator=generator, dtype=torch.float64) if cut_off else None
    expected = brute_force_gae(rewards, values, mask, gamma, lam, bootstrap)
    for poison in (0.0, float("nan")):
        given_rewards, given_values = (torch.where(mask, x, torch.full_like(x, poison)) for x in (rewards, values))
        ours = gae(given_rewards, given_values, mask, gamma, lam, bootstrap)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_gamma_and_lambda_one_give_the_reward_to_go() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    _, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert returns.tolist() == [[7, 6, 4]]


def test_lambda_zero_gives_the_one_step_error() -> None:
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    advantages, _ = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=0.5, lam=0.0)
    assert advantages.tolist() == [[1, -18]]


# "The N Implementation Details of RLHF with PPO" (Huang et al. 2023), detail 9: PyTorch's unbiased column.
PUBLISHED = [[0.1394, 0.5046, 0.8697], [1.2349, 1.6000, 1.9651], [2.3303, 2.6954, 3.0606]]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_gives_the_published_vector(shift_mean: bool) -> None:
    x = torch.arange(12, 21, dtype=torch.float64).reshape(3, 3) / 10
    published = torch.tensor(PUBLISHED, dtype=torch.float64) - (1.6 if shift_mean else 0.0)
    ours = whiten(x, torch.ones(3, 3, dtype=torch.bool), shift_mean=shift_mean)
    torch.testing.assert_close(ours, published, rtol=0, atol=5e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 6))
def test_whitened_entries_have_mean_zero_and_variance_one(seed: int, rows: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 5 + 3 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[0, :2] = True
    poisoned = torch.where(mask, x, torch.full_like(x, float("nan")))
    white, kept = whiten(poisoned, mask), whiten(poisoned, mask, shift_mean=False)
    assert (white[~mask] == 0).all()
    assert (kept[~mask] == 0).all()
    torch.testing.assert_close(white[mask].mean(), torch.tensor(0.0).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(white[mask].var(), torch.tensor(1.0).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(kept[mask], white[mask] + x[mask].mean())


def test_whitening_what_does_not_vary_gives_zero() -> None:
    mask = torch.tensor([[True, False, True]])
    assert whiten(torch.tensor([[2.0, 9.0, 2.0]]), mask).tolist() == [[0, 0, 0]]
    assert whiten(torch.tensor([[2.0, 9.0, 9.0]]), torch.tensor([[True, False, False]])).tolist() == [[0, 0, 0]]
    assert whiten(torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]]


# Groups of sizes three, two and one, not in order. Group 5: 1, 2, 6. Group 3: 4, 4. Group 9: 8. The batch's mean: 25/6.
SCORES = torch.tensor([1.0, 4.0, 2.0, 8.0, 4.0, 6.0], dtype=torch.float64)
GROUPS = torch.tensor([5, 3, 5, 9, 3, 5])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", [-2 / (math.sqrt(7) + 1e-4), 0, -1 / (math.sqrt(7) + 1e-4), 0, 0, 3 / (math.sqrt(7) + 1e-4)]),
        ("dr_grpo", [-2, 0, -1, 0, 0, 3]),
        ("rloo", [1 - 4, 0, 2 - 3.5, 0, 0, 6 - 1.5]),
        ("reinforce", [(s - 25 / 6) / (math.sqrt((137 - 625 / 6) / 5) + 1e-4) for s in SCORES.tolist()]),
        ("reinforce_baseline", [a / (math.sqrt(14 / 5) + 1e-4) for a in [-2, 0, -1, 0, 0, 3]]),
    ],
)
def test_group_advantages_by_hand(kind: str, expected: list[float]) -> None:
    ours = group_advantages(SCORES, GROUPS, kind)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    turn = torch.tensor([4, 0, 5, 1, 3, 2])
    torch.testing.assert_close(group_advantages(SCORES[turn], GROUPS[turn], kind), ours[turn])


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline"])
def test_equal_scores_have_no_advantage_not_even_rounding(kind: str) -> None:
    """Eight times 10000.1, summed in float32 and divided by 8, is 0.001 too much; grpo would make -0.9 of it."""
    scores = torch.tensor([10000.1] * 8 + [0.7] * 8)
    assert sum(scores[:8]) / 8 != scores[0]
    assert (group_advantages(scores[:8], torch.zeros(8, dtype=torch.int64), kind) == 0).all()
    if kind != "reinforce":
        assert (group_advantages(scores, torch.tensor([0] * 8 + [1] * 8), kind) == 0).all()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown group_advantages kind 'gpro': did you mean 'grpo'"):
        group_advantages(SCORES, GROUPS, "gpro")


REWARDS = [0.3, -1.0, 2.0, 0.5, 0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("kind", "trainer_class", "config_class", "options"),
    [
        ("grpo", GRPOTrainer, GRPOConfig, {"scale_rewards": "group"}),
        ("dr_grpo", GRPOTrainer, GRPOConfig, {"scale_rewards": "none"}),
        ("rloo", RLOOTrainer, RLOOConfig, {"normalize_advantages": False}),
    ],
)
def test_group_advantages_against_trls_trainers(
    kind: str,
    trainer_class: Callable[..., GRPOTrainer],
    config_class: Callable[..., GRPOConfig],
    options: dict[str, object],
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """Two prompts of four answers, scored by a table; trl generates, scores and normalises by itself."""
    config = config_class(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=3,
        beta=0.0,
        **options,
        **TRL_ON_CPU,
    )
    rows = Dataset.from_dict({"prompt": ["w1 w2", "w3"] * 4})
    trainer = trainer_class(llama, lambda **_: REWARDS, args=config, train_dataset=rows, processing_class=tokenizer)
    theirs = trainer._generate_and_score_completions([{"prompt": "w1 w2"}] * 4 + [{"prompt": "w3"}] * 4)
    ours = group_advantages(torch.tensor(REWARDS), torch.tensor([0] * 4 + [1] * 4), kind)
    torch.testing.assert_close(ours, theirs["advantages"], rtol=1e-5, atol=1e-5)


def test_registered_estimators_share_one_call() -> None:
    """Rewards 0.5 + 1 and 1 + 2 of two answers to one prompt: scores 1.5 and 3, and the reward to go for a critic."""
    rewards = torch.tensor([[9.0, 0.5, 1.0], [9.0, 1.0, 2.0]])
    values = torch.full((2, 3), 0.25)
    mask = torch.tensor([[False, True, True], [False, True, True]])
    call = {"gamma": 1.0, "lam": 1.0, "group_ids": torch.tensor([7, 7])}
    assert set(names("advantage")) >= {"gae", "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline"}
    advantages, returns = lookup("advantage", "dr_grpo")(rewards, values, mask, **call)
    assert advantages.tolist() == [[0, -0.75, -0.75], [0, 0.75, 0.75]]
    assert returns.tolist() == [[0, 1.5, 1], [0, 3, 2]]
    advantages, returns = lookup("advantage", "rloo")(rewards, values, mask, **call)
    assert advantages.tolist() == [[0, -1.5, -1.5], [0, 1.5, 1.5]]
    advantages, returns = lookup("advantage", "gae")(rewards, values, mask, **call)
    assert advantages.tolist() == [[0, 1.25, 0.75], [0, 2.75, 1.75]]
    assert returns.tolist() == [[0, 1.5, 1], [0, 3, 2]]
