"""next_token_loss by hand, against torch's cross entropy, transformers' Llama and trl's SFT trainer."""

import math
from pathlib import Path

import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import framework
from framework.objectives.language import next_token_loss
from tests.objectives.laws import TRL_ON_CPU, check_metrics, check_poison, check_split_invariance, mean


def test_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -8.0, -16.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss, metrics = next_token_loss(log_probs, mask, num_tokens=7)
    assert float(loss) == 3.5 / 7
    assert [float(x) for x in metrics["loss"]] == [3.5, 3.0]
    check_metrics(metrics)


def test_it_is_torchs_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.7
    log_probs = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    loss, metrics = next_token_loss(log_probs, mask, mask.sum().reshape(1))
    theirs = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.masked_fill(~mask, -100).flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, theirs)))
    assert math.isclose(mean(metrics, "loss"), float(theirs.detach()))


def test_against_trls_sft_trainer(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Completion-only loss of two rows of unequal length, divided by all tokens of the batch."""
    rows = Dataset.from_dict(
        {"prompt": ["w1 w2 ", "w3 "], "completion": ["w4 w5 w6 w7", "w8"]},
    )
    config = SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, loss_type="nll", **TRL_ON_CPU)
    trainer = SFTTrainer(llama, args=config, train_dataset=rows, processing_class=tokenizer)
    llama.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    mask = labels != -100
    theirs = trainer.compute_loss(llama, dict(batch), num_items_in_batch=mask.sum())
    logits = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    ours, _ = next_token_loss(log_probs, mask, mask.sum())
    assert mask.sum() == 7  # both completions with their end tokens
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 6), max_size=4))
def test_any_split_gives_the_same_gradient(seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(6, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 4, generator=generator) < 0.5
    check_split_invariance(lambda x, m: next_token_loss(x, m, mask.sum()), [log_probs], [mask], cuts)


def test_poison_under_the_mask_stays_out() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    check_poison(lambda x: next_token_loss(x, mask, 2), [-torch.ones(2, 3)], mask, num_trained=1)


def test_a_batch_without_tokens_is_zero() -> None:
    log_probs = torch.full((2, 3), -1.0, requires_grad=True)
    loss, metrics = next_token_loss(log_probs, torch.zeros(2, 3, dtype=torch.bool), num_tokens=0)
    loss.backward()
    assert float(loss) == 0
    assert log_probs.grad is not None
    assert (log_probs.grad == 0).all()
    assert [float(x) for x in metrics["loss"]] == [0, 0]


def test_the_room_answers_by_name() -> None:
    assert framework.objectives.next_token_loss is next_token_loss
    assert set(framework.objectives.__all__) >= {"gae", "whiten", "dpo_loss", "policy_loss", "value_loss"}
    assert all(callable(getattr(framework.objectives, name)) for name in framework.objectives.__all__)
