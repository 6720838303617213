"""Ranking and DPO losses by hand, against trl's reward and DPO trainers on a tiny Llama, and by their closed forms."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from framework.core.errors import UsageError
from framework.objectives.preference import answer_loss, dpo_loss, pairwise_ranking_loss
from tests.objectives.laws import TRL_ON_CPU, check_metrics, check_split_invariance, mean

PAIRS = {
    "prompt": ["w1 w2 ", "w3 ", "w4 w5 w6 "],
    "chosen": ["w7 w8", "w9 w10 w11 w12", "w13"],
    "rejected": ["w8", "w7 w2", "w1 w1 w1"],
}


def test_ranking_by_hand() -> None:
    """Gaps ln 3 and -ln 3: σ is 3/4 and 1/4."""
    chosen = torch.tensor([math.log(3), 0.0, 1.0])
    rejected = torch.tensor([0.0, math.log(3), 1.0])
    loss, metrics = pairwise_ranking_loss(chosen, rejected, num_pairs=3)
    assert math.isclose(float(loss), (math.log(4 / 3) + math.log(4) + math.log(2)) / 3, rel_tol=1e-6)
    assert math.isclose(mean(metrics, "accuracy"), 1 / 3, rel_tol=1e-6)  # a tie is wrong
    assert math.isclose(mean(metrics, "score_margin"), 0, abs_tol=1e-6)
    assert math.isclose(mean(metrics, "score_chosen"), (math.log(3) + 1) / 3, rel_tol=1e-6)
    assert math.isclose(mean(metrics, "score_rejected"), (math.log(3) + 1) / 3, rel_tol=1e-6)
    check_metrics(metrics)


def test_margin_and_centring_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    loss, metrics = pairwise_ranking_loss(
        chosen, rejected, num_pairs=1, margin=torch.tensor([1.0]), center_coefficient=0.01
    )
    assert math.isclose(float(loss), math.log(2) + 0.01 * 9, rel_tol=1e-6)
    assert mean(metrics, "accuracy") == 1  # the margin does not count there


@pytest.mark.parametrize("center", [None, 0.1])
@pytest.mark.parametrize("margin", [None, [0.5, 0.0, -1.0]])
def test_ranking_against_trls_reward_trainer(
    llama_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, center: float | None, margin: list[float]
) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(llama_folder, num_labels=1).eval()
    model.score.weight.data.normal_(std=1.0)
    rows = Dataset.from_dict(PAIRS | ({"margin": margin} if margin else {}))
    config = RewardConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=3, center_rewards_coefficient=center, **TRL_ON_CPU
    )
    trainer = RewardTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(model, dict(batch))
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    ours, metrics = pairwise_ranking_loss(
        *scores.chunk(2), 3, margin=batch.get("margin"), center_coefficient=center or 0
    )
    assert ("margin" in batch) == (margin is not None)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    reported = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    assert math.isclose(mean(metrics, "accuracy"), reported["accuracy"], rel_tol=1e-6)
    assert math.isclose(mean(metrics, "score_margin"), reported["margin"], rel_tol=1e-5, abs_tol=1e-6)


def response_log_probs(model: LlamaForCausalLM, batch: dict[str, Tensor], average: bool = False) -> tuple[Tensor, ...]:
    """[B] of chosen and of rejected, from the model's logits alone."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    mask = batch["completion_mask"][:, 1:]
    each = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask
    return (each.sum(1) / (mask.sum(1) if average else 1)).chunk(2)


@pytest.mark.parametrize(
    ("kind", "theirs_kind", "smoothing", "pairs"),
    [
        ("sigmoid", "sigmoid", 0.0, 3),
        ("hinge", "hinge", 0.0, 3),
        ("ipo", "ipo", 0.0, 3),
        # trl smooths labels in `aot` only, whose sorting changes nothing in a batch of one pair.
        ("sigmoid", "aot", 0.1, 1),
    ],
)
def test_dpo_against_trls_trainer(
    llama: LlamaForCausalLM,
    other_llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    kind: str,
    theirs_kind: str,
    smoothing: float,
    pairs: int,
) -> None:
    config = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=pairs,
        loss_type=[theirs_kind],
        beta=0.3,
        label_smoothing=smoothing,
        **TRL_ON_CPU,
    )
    rows = Dataset.from_dict(PAIRS)
    trainer = DPOTrainer(llama, ref_model=other_llama, args=config, train_dataset=rows, processing_class=tokenizer)
    llama.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(llama, dict(batch))
    policy = response_log_probs(llama, batch, average=kind == "ipo")
    reference = response_log_probs(other_llama, batch, average=kind == "ipo")
    ours, metrics = dpo_loss(*policy, *reference, beta=0.3, num_pairs=pairs, kind=kind, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x, llama.model.embed_tokens.weight, retain_graph=True)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    if kind != "ipo":
        reported = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
        assert math.isclose(mean(metrics, "reward_margin"), reported["rewards/margins"], rel_tol=1e-4)
        assert math.isclose(mean(metrics, "reward_chosen"), reported["rewards/chosen"], rel_tol=1e-4)
        assert math.isclose(mean(metrics, "accuracy"), reported["rewards/accuracies"], rel_tol=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 1 / (4 * 0.2**2))])
def test_dpo_at_equal_models(kind: str, expected: float) -> None:
    chosen, rejected = torch.tensor([-3.0, -7.5]), torch.tensor([-4.0, -2.25])
    loss, metrics = dpo_loss(chosen, rejected, chosen, rejected, beta=0.2, num_pairs=2, kind=kind)
    assert math.isclose(float(loss), expected, rel_tol=1e-6)
    assert mean(metrics, "reward_margin") == 0
    assert mean(metrics, "accuracy") == 0
    check_metrics(metrics)


def test_dpo_by_hand() -> None:
    """β h = ln 3 with β = 1/2 and h = 2 ln 3: σ(βh) = 3/4; smoothing 0.2 mixes in -log 1/4."""
    h = torch.tensor([2 * math.log(3)])
    zero = torch.zeros(1)
    loss, metrics = dpo_loss(h, zero, zero, zero, beta=0.5, num_pairs=1, label_smoothing=0.2)
    assert math.isclose(float(loss), 0.8 * math.log(4 / 3) + 0.2 * math.log(4), rel_tol=1e-6)
    assert math.isclose(mean(metrics, "reward_chosen"), math.log(3), rel_tol=1e-6)
    assert mean(metrics, "reward_rejected") == 0
    assert mean(metrics, "accuracy") == 1


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo_gradient_is_the_formulas(kind: str) -> None:
    """dL/dh: -β σ(-βh), -β [βh < 1], 2 (h - 1/(2β)); and the rejected answer gets the opposite."""
    beta, h = 0.4, torch.tensor([-1.0, 0.5, 4.0], dtype=torch.float64)
    chosen, rejected = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss, _ = dpo_loss(chosen, rejected, -h, torch.zeros_like(h), beta=beta, num_pairs=1, kind=kind)
    ours = torch.autograd.grad(loss, [chosen, rejected])
    slope = {
        "sigmoid": [-beta / (1 + math.exp(beta * x)) for x in h.tolist()],
        "hinge": [-beta * (beta * x < 1) for x in h.tolist()],
        "ipo": [2 * (x - 1 / (2 * beta)) for x in h.tolist()],
    }[kind]
    torch.testing.assert_close(ours[0], torch.tensor(slope, dtype=torch.float64))
    torch.testing.assert_close(ours[1], -ours[0])


def test_dpo_refuses_what_it_does_not_know() -> None:
    one = torch.ones(1)
    with pytest.raises(UsageError, match="unknown dpo_loss kind 'sigmiod': did you mean 'sigmoid'"):
        dpo_loss(one, one, one, one, beta=0.1, num_pairs=1, kind="sigmiod")
    with pytest.raises(UsageError, match=r"label_smoothing=0\.1 has no meaning for kind 'ipo'"):
        dpo_loss(one, one, one, one, beta=0.1, num_pairs=1, kind="ipo", label_smoothing=0.1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 6), max_size=3), st.sampled_from(["sigmoid", "hinge", "ipo"]))
def test_any_split_gives_the_same_gradient(seed: int, cuts: list[int], kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(4)]
    check_split_invariance(
        lambda c, r, rc, rr: dpo_loss(c, r, rc, rr, beta=0.3, num_pairs=torch.tensor([6]), kind=kind),
        pairs[:2],
        pairs[2:],
        cuts,
    )
    check_split_invariance(
        lambda c, r, m: pairwise_ranking_loss(c, r, 6, margin=m, center_coefficient=0.05), pairs[:2], pairs[2:3], cuts
    )


def test_no_pairs_are_zero() -> None:
    none = torch.zeros(0, requires_grad=True)
    loss, metrics = pairwise_ranking_loss(none, none, num_pairs=0)
    loss.backward()
    assert float(loss) == 0
    assert [float(x) for x in metrics["accuracy"]] == [0, 0]
    assert float(dpo_loss(none, none, none, none, beta=0.1, num_pairs=0)[0]) == 0


def test_great_gaps_stay_finite() -> None:
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss, _ = pairwise_ranking_loss(chosen, torch.zeros(2), num_pairs=1)
    loss.backward()
    assert float(loss) == 1e4
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [-1, 0]


def test_the_answers_own_loss_by_hand() -> None:
    """3 nats over 2 tokens, 6 over 3; each answer alike, where a mean over tokens would be 9/5."""
    loss, metrics = answer_loss(torch.tensor([-3.0, -6.0]), torch.tensor([2, 3]), num_pairs=2)
    assert float(loss) == mean(metrics, "sft_loss") == 1.75
    check_metrics(metrics)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 6), max_size=3))
def test_any_split_of_the_answers_gives_the_same_gradient(seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(6, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (6,), generator=generator)
    check_split_invariance(lambda x, n: answer_loss(x, n, torch.tensor([6])), [log_probs], [lengths], cuts)
