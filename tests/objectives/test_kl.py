"""KL estimators, token rewards and the adaptive coefficient: by hand, by definition, and by the published constants."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from framework.core.errors import UsageError
from framework.objectives.kl import adapt_coefficient, estimate_kl, token_rewards
from tests.objectives.laws import TRL_ON_CPU

KINDS = ["k1", "k2", "k3"]


@pytest.mark.parametrize(
    ("kind", "expected"), [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", math.log(2) - 0.5)]
)
def test_estimators_by_hand(kind: str, expected: float) -> None:
    """The policy gives the token twice the reference's probability."""
    kl = estimate_kl(torch.tensor([math.log(0.4)]), torch.tensor([math.log(0.2)]), kind)
    assert math.isclose(float(kl), expected, rel_tol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_kl(kind: str) -> None:
    log_probs = torch.tensor([[-1.5, -1e-7], [-30.0, 0.0]])
    assert (estimate_kl(log_probs, log_probs, kind) == 0).all()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased_estimators_have_the_kl_as_expectation(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    torch.testing.assert_close((p.exp() * estimate_kl(p, q, kind)).sum(), exact)


def test_k2_is_close_to_the_kl_of_neighbours_only() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(-1)
    for distance, error in ((0.01, 0.01), (1.0, 0.5)):
        q = (p + distance * torch.randn(9, generator=generator, dtype=torch.float64)).log_softmax(-1)
        exact = float((p.exp() * (p - q)).sum())
        assert abs(float((p.exp() * estimate_kl(p, q, "k2")).sum()) / exact - 1) < error


@pytest.mark.parametrize("difference", [1e-3, 1e-5])
def test_k3_keeps_its_digits_near_zero(difference: float) -> None:
    """e^-d - 1 + d by itself loses all digits of a float32 here."""
    kl = estimate_kl(torch.tensor([difference]), torch.zeros(1), "k3")
    assert float(kl) >= 0
    assert math.isclose(float(kl), difference**2 / 2, rel_tol=0.1, abs_tol=1e-12)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown KL estimator 'k4'"):
        estimate_kl(torch.zeros(1), torch.zeros(1), "k4")


def test_k3_against_trls_grpo(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, llama_folder: Path, tmp_path: Path
) -> None:
    """With advantages 0 and beta 1, without its correction by the ratio, trl's loss is the mean k3 alone."""
    llama.config._name_or_path = str(llama_folder)
    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=3,
        beta=1.0,
        loss_type="bnpo",
        use_bias_correction_kl=False,
        **TRL_ON_CPU,
    )
    rows = Dataset.from_dict({"prompt": ["w1"] * 4})
    trainer = GRPOTrainer(llama, lambda **_: [0.0], args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    llama.eval()
    tokens = torch.tensor([[3, 4, 5, 6], [3, 7, 8, 1]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    reference = -torch.rand(2, 3, generator=torch.Generator().manual_seed(0)) * 3
    theirs = trainer._compute_loss(
        llama,
        {
            "prompt_ids": tokens[:, :1],
            "prompt_mask": torch.ones(2, 1, dtype=torch.long),
            "completion_ids": tokens[:, 1:],
            "completion_mask": mask,
            "advantages": torch.zeros(2),
            "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
        },
    )
    logits = llama(tokens).logits[:, :-1].log_softmax(-1)
    log_probs = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    ours = (estimate_kl(log_probs, reference, "k3") * mask).sum() / 5
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_token_rewards_by_hand() -> None:
    """Two responses, one ended early and one with a tool's answer inside; the third row has none."""
    kl = torch.tensor([[9.0, 0.5, -0.2, 9.0], [0.1, 9.0, 0.3, 0.4], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    rewards = token_rewards(torch.tensor([1.0, -2.0, 5.0]), kl, mask, coefficient=0.1)
    expected = torch.tensor([[0, -0.05, 1.02, 0], [-0.01, 0, -0.03, -2.04], [0, 0, 0, 0]])
    torch.testing.assert_close(rewards, expected)


def brute_force(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    rewards = torch.zeros_like(kl)
    for b in range(kl.shape[0]):
        counting = [t for t in range(kl.shape[1]) if mask[b, t]]
        for t in counting:
            rewards[b, t] = -coefficient * kl[b, t] + (scores[b] if t == counting[-1] else 0)
    return rewards


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.sampled_from([float("nan"), float("inf"), 3.0]))
def test_token_rewards_against_a_loop(seed: int, rows: int, length: int, poison: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    kl = torch.randn(rows, length, generator=generator)
    scores = torch.randn(rows, generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.5
    poisoned = torch.where(mask, kl, torch.full_like(kl, poison))
    rewards = token_rewards(scores, poisoned, mask, coefficient=0.3)
    torch.testing.assert_close(rewards, brute_force(scores, kl, mask, 0.3))
    total = torch.where(mask.any(1), scores, 0) - 0.3 * (kl * mask).sum(1)
    torch.testing.assert_close(rewards.sum(1), total)


def test_the_adaptive_coefficient_by_the_published_constants() -> None:
    """β 0.15, target 6, horizon 10 000, batch 512: the error is clipped at a fifth on both sides."""
    assert adapt_coefficient(0.15, 60.0, 6.0, 10000, 512) == 0.15 * (1 + 0.2 * 0.0512)
    assert adapt_coefficient(0.15, 0.0, 6.0, 10000, 512) == 0.15 * (1 - 0.2 * 0.0512)
    assert adapt_coefficient(0.15, 6.0, 6.0, 10000, 512) == 0.15
    assert math.isclose(adapt_coefficient(0.15, 6.6, 6.0, 10000, 512), 0.15 * (1 + 0.1 * 0.0512))


def test_the_adaptive_coefficient_finds_the_price_that_holds_the_target() -> None:
    """A policy whose KL is 1/β: the price must settle where KL = 4."""
    coefficient = 2.0
    for _ in range(3000):
        coefficient = adapt_coefficient(coefficient, 1 / coefficient, 4.0, 10000, 256)
    assert math.isclose(1 / coefficient, 4.0, rel_tol=1e-3)
