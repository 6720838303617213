"""PPO's two losses by hand, against loops in float64 and trl's GRPO trainer, and by the laws of every loss."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from framework.core.errors import UsageError
from framework.core.registry import lookup
from framework.objectives.ppo import explained_variance, policy_loss, value_loss
from tests.objectives.laws import TRL_ON_CPU, check_metrics, check_poison, check_split_invariance, mean

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def test_policy_loss_by_hand() -> None:
    """Ratios 2, 1/2, 2, 1/2, 1.25 with advantages of both signs: the clip bites where it would be too much of a good
    thing (first) or of flight from a bad one (fourth), and never holds back a retreat."""
    ratios = torch.tensor([[2.0, 0.5, 2.0, 0.5, 1.25]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 4.0]])
    log_probs = ratios.log().requires_grad_()
    loss, metrics = policy_loss(log_probs, torch.zeros(1, 5), advantages, torch.ones(1, 5), 5, **CLIP)
    loss.backward()
    assert math.isclose(float(loss.detach()), -(1.3 + 0.5 - 2.0 - 0.8 + 5.0) / 5, rel_tol=1e-6)
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, -torch.tensor([[0, 0.5, -2.0, 0, 5.0]]) / 5)
    assert math.isclose(mean(metrics, "policy_loss"), float(loss.detach()), rel_tol=1e-6)
    assert math.isclose(mean(metrics, "clip_fraction"), 0.4, rel_tol=1e-6)
    assert math.isclose(mean(metrics, "clip_fraction_low"), 0.2, rel_tol=1e-6)
    assert math.isclose(mean(metrics, "clip_fraction_high"), 0.2, rel_tol=1e-6)
    assert math.isclose(mean(metrics, "ratio"), 6.25 / 5, rel_tol=1e-6)
    assert math.isclose(mean(metrics, "ratio_deviation"), (1 + 0.5 + 1 + 0.5 + 0.25) / 5, rel_tol=1e-6)
    k3 = [r - 1 - math.log(r) for r in (2, 0.5, 2, 0.5, 1.25)]
    assert math.isclose(mean(metrics, "approx_kl"), sum(k3) / 5, rel_tol=1e-5)
    check_metrics(metrics)


def brute_force_policy(
    log_probs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, denominator: float, level: str
) -> float:
    total = 0.0
    for b in range(log_probs.shape[0]):
        steps = [t for t in range(log_probs.shape[1]) if weights[b, t] > 0]
        gaps = {t: float(log_probs[b, t] - old[b, t]) for t in steps}
        for t in steps:
            gap = gaps[t] if level == "token" else sum(gaps.values()) / len(steps)
            ratio, advantage = math.exp(gap), float(advantages[b, t])
            kept = min(max(ratio, 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"])
            total -= float(weights[b, t]) * min(ratio * advantage, kept * advantage)
    return total / denominator


def random_batch(seed: int, rows: int = 4, length: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_probs, old, advantages = torch.randn(3, rows, length, generator=generator, dtype=torch.float64)
    weights = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    return log_probs, old, advantages, torch.where(weights < 0.4, 0.0, weights)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["token", "sequence"]))
def test_policy_loss_against_a_loop(seed: int, level: str) -> None:
    batch = random_batch(seed)
    loss, metrics = policy_loss(*batch, 7.0, **CLIP, level=level)
    assert math.isclose(float(loss), brute_force_policy(*batch, 7.0, level), rel_tol=1e-9, abs_tol=1e-12)
    total, weight = metrics["policy_loss"]
    torch.testing.assert_close(total / 7.0, loss)
    torch.testing.assert_close(weight, batch[3].sum())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_gradient_is_the_derivative(level: str) -> None:
    log_probs, old, advantages, weights = random_batch(3, rows=2, length=4)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, weights, 3.0, **CLIP, level=level)[0], log_probs.requires_grad_()
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratio_one_gives_minus_the_weighted_advantage_exactly(level: str) -> None:
    log_probs, _, advantages, weights = random_batch(5)
    loss, metrics = policy_loss(log_probs, log_probs.clone(), advantages, weights, 9.0, **CLIP, level=level)
    assert torch.equal(loss, -(weights * advantages).sum() / 9.0)
    for name in ("ratio_deviation", "approx_kl", "clip_fraction"):
        assert float(metrics[name][0]) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 4), max_size=3), st.sampled_from(["token", "sequence"]))
def test_any_split_gives_the_same_gradient(seed: int, cuts: list[int], level: str) -> None:
    log_probs, old, advantages, weights = random_batch(seed)
    denominator = weights.sum().reshape(1)
    check_split_invariance(
        lambda *parts: policy_loss(*parts, denominator, **CLIP, level=level),
        [log_probs],
        [old, advantages, weights],
        cuts,
    )
    check_split_invariance(
        lambda *parts: value_loss(*parts, denominator, clip=0.2), [log_probs], [old, advantages, weights], cuts
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_poison_under_the_mask_stays_out_of_the_policy_loss(level: str) -> None:
    *tensors, weights = random_batch(7)
    weights[2] = 0
    check_poison(lambda *x: policy_loss(*x, weights, 5, **CLIP, level=level), tensors, weights > 0, num_trained=1)


def test_poison_under_the_mask_stays_out_of_the_value_loss() -> None:
    *tensors, weights = random_batch(7)
    check_poison(lambda *x: value_loss(*x, weights, 5, clip=0.2), tensors, weights > 0, num_trained=1)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_batch_without_tokens_is_zero(level: str) -> None:
    log_probs = torch.zeros(2, 3, requires_grad=True)
    none = torch.zeros(2, 3)
    for loss, metrics in (
        policy_loss(log_probs, none, none + 1, none, 0, **CLIP, level=level),
        value_loss(log_probs, none, none + 1, none, 0, clip=0.2),
    ):
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert float(loss.detach()) == 0
        assert (gradient == 0).all()
        assert all(float(total) == float(weight) == 0 for total, weight in metrics.values())


def test_a_mask_serves_as_weights() -> None:
    log_probs, old, advantages, weights = random_batch(8)
    mask = weights > 0
    for loss in (
        lambda w: policy_loss(log_probs, old, advantages, w, mask.sum(), **CLIP),
        lambda w: value_loss(log_probs, old, advantages, w, mask.sum(), clip=0.2),
    ):
        assert torch.equal(loss(mask)[0], loss(mask.double())[0])


def test_arguments_are_left_alone() -> None:
    batch = random_batch(9)
    before = [x.clone() for x in batch]
    policy_loss(*batch, 5, **CLIP, level="sequence")
    value_loss(*batch, 5, clip=0.2)
    assert all(torch.equal(x, y) for x, y in zip(batch, before))


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown policy_loss level 'row'; choose token or sequence"):
        policy_loss(*random_batch(0), 5, **CLIP, level="row")


def test_registered_losses_are_the_two_levels() -> None:
    batch = random_batch(11)
    for name, level in (("clip", "token"), ("gspo", "sequence")):
        unused = {"entropy": torch.full_like(batch[0], torch.nan), "reference_log_probs": batch[1]}
        registered = lookup("policy_loss", name)(*batch, 5.0, clip_low=0.2, clip_high=0.3, **unused)
        assert torch.equal(registered[0], policy_loss(*batch, 5.0, **CLIP, level=level)[0])


# One trl loss after another is ours with other weights: mask / length over B, mask over N, mask over B · max_tokens.
@pytest.mark.parametrize(
    ("loss_type", "level"),
    [
        ("grpo", "token"),
        ("bnpo", "token"),
        ("dr_grpo", "token"),
        ("dapo", "token"),
        ("grpo", "sequence"),
        ("dapo", "sequence"),
    ],
)
def test_policy_loss_against_trls_grpo(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, loss_type: str, level: str
) -> None:
    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        beta=0.0,
        loss_type=loss_type,
        epsilon=0.2,
        epsilon_high=0.3,
        importance_sampling_level=level,
        **TRL_ON_CPU,
    )
    rows = Dataset.from_dict({"prompt": ["w1"] * 4})
    trainer = GRPOTrainer(llama, lambda **_: [0.0], args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    llama.eval()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 20, (4, 7), generator=generator)
    mask = torch.tensor([[1] * 5, [1] * 4 + [0], [1] * 2 + [0] * 3, [1] + [0] * 4])
    advantages = torch.tensor([1.5, -0.5, -2.0, 1.0])
    logits = llama(tokens).logits[:, 1:-1].log_softmax(-1)
    log_probs = logits.gather(-1, tokens[:, 2:, None]).squeeze(-1)
    old = log_probs.detach() + 0.5 * torch.randn(4, 5, generator=generator)
    inputs: dict[str, Any] = {
        "prompt_ids": tokens[:, :2],
        "prompt_mask": torch.ones(4, 2, dtype=torch.long),
        "completion_ids": tokens[:, 2:],
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }
    theirs = trainer._compute_loss(llama, inputs)
    weights, denominator = {
        "grpo": (mask / mask.sum(1, keepdim=True), 4),
        "bnpo": (mask.float(), mask.sum()),
        "dapo": (mask.float(), mask.sum()),
        "dr_grpo": (mask.float(), 4 * 6),
    }[loss_type]
    spread = advantages[:, None].expand(4, 5)
    ours, metrics = policy_loss(log_probs, old, spread, weights, denominator, clip_low=0.2, clip_high=0.3, level=level)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    embedding = llama.model.embed_tokens.weight
    torch.testing.assert_close(
        torch.autograd.grad(ours, embedding, retain_graph=True), torch.autograd.grad(theirs, embedding),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    if level == "token" and loss_type != "grpo":
        reported = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
        assert 0 < reported["clip_ratio/region_mean"] < 1
        assert math.isclose(mean(metrics, "clip_fraction"), reported["clip_ratio/region_mean"], rel_tol=1e-5)
        assert math.isclose(mean(metrics, "clip_fraction_low"), reported["clip_ratio/low_mean"], rel_tol=1e-5)
        assert math.isclose(mean(metrics, "clip_fraction_high"), reported["clip_ratio/high_mean"], rel_tol=1e-5)


def test_value_loss_by_hand() -> None:
    """Old value 0, clip 0.2. Moving 1 towards a return of 1 pays the clipped ½·0.8²; moving away pays in full."""
    values = torch.tensor([[1.0, -1.0, 0.1]], requires_grad=True)
    returns = torch.tensor([[1.0, 1.0, 1.0]])
    loss, metrics = value_loss(values, torch.zeros(1, 3), returns, torch.ones(1, 3), 3, clip=0.2)
    loss.backward()
    assert math.isclose(float(loss.detach()), (0.8**2 + 2**2 + 0.9**2) / 2 / 3, rel_tol=1e-6)
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([[0, -2.0, -0.9]]) / 3)
    assert math.isclose(mean(metrics, "value_clip_fraction"), 1 / 3, rel_tol=1e-6)
    assert mean(metrics, "value") == 0
    assert mean(metrics, "return") == 1
    check_metrics(metrics)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 2))
def test_value_loss_against_a_loop(seed: int, clip: float) -> None:
    values, old, returns, weights = random_batch(seed)
    total = 0.0
    for v, o, r, w in zip(*(x.flatten().tolist() for x in (values, old, returns, weights))):
        near = min(max(v, o - clip), o + clip)
        total += w * 0.5 * max((v - r) ** 2, (near - r) ** 2)
    loss, _ = value_loss(values, old, returns, weights, 6.0, clip=clip)
    assert math.isclose(float(loss), total / 6.0, rel_tol=1e-9)


def test_explained_variance_is_exact_over_any_split() -> None:
    """From the sums of two micro-batches: the textbook 1 - Var(R - V)/Var(R) of all counting tokens."""
    values, old, returns, weights = random_batch(13)
    mask = weights > 0
    parts = [value_loss(*(x[rows] for x in (values, old, returns, mask)), 1, clip=0.2)[1] for rows in ([0], [1, 2, 3])]
    means = {
        name: float(sum(part[name][0] for part in parts) / sum(part[name][1] for part in parts)) for name in parts[0]
    }
    ours = explained_variance(
        means["return"], means["return_square"], means["return_error"], means["return_error_square"]
    )
    textbook = 1 - (returns - old)[mask].var(correction=0) / returns[mask].var(correction=0)
    assert math.isclose(ours, float(textbook), rel_tol=1e-9)
    assert explained_variance(2.0, 4.0, 0.5, 1.0) == 0
