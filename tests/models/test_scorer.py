"""The Scorer: labels, entropy, values and classes at prediction positions, and nothing for what does not count."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from framework.core.records import Metrics, PreferenceBatch, Rollout, Rows, Scores, TokenBatch
from framework.models.scorer import Scorer, logical_name, one_document_a_row
from tests.models.drawn import TINY, drawn, positions, tokens


def packed() -> TokenBatch:
    """Two documents of 5 and 4 tokens and 3 of padding, then one of 12; the first two labels are a prompt's."""
    x = tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 9:] = mask[0, :2] = False
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], list(range(12))])
    ids = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    return TokenBatch(x, tokens(2, 12, seed=2), mask, places, ids)


def padded(lengths: list[int], seed: int = 1) -> TokenBatch:
    x = tokens(len(lengths), 8, seed=seed)
    real = torch.arange(8) < torch.tensor(lengths).unsqueeze(1)
    return TokenBatch(x * real, x.roll(-1, 1), real, positions(len(lengths), 8) * real, real.long())


def pairs() -> PreferenceBatch:
    return PreferenceBatch(padded([8, 3, 5]), padded([2, 8, 1], seed=5))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tied", [False, True])
def test_log_probs_and_entropy_are_those_of_the_logits(strict: bool, temperature: float, tied: bool) -> None:
    model = drawn(replace(TINY, tied=tied), strict, torch.float64)
    rows = packed()
    scores = Scorer(model, temperature=temperature)(rows, with_entropy=True)
    hidden = model(rows.tokens, positions=rows.positions, document_ids=rows.document_ids)
    table = F.log_softmax(model.logits(hidden) / temperature, -1)
    expected = table.gather(2, rows.labels.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(scores.log_probs, expected * rows.loss_mask, rtol=0, atol=1e-12)
    entropy = -(table.exp() * table).sum(2)
    torch.testing.assert_close(scores.entropy, entropy * rows.loss_mask, rtol=0, atol=1e-12)
    assert scores.values is None
    assert scores.classes is None


def test_gradients_are_those_of_cross_entropy() -> None:
    model, rows = drawn(dtype=torch.float64), packed()
    scorer = Scorer(model)
    leaves = list(scorer.parameters())
    ours = torch.autograd.grad(-scorer(rows).log_probs.sum(), leaves)
    hidden = model(rows.tokens, positions=rows.positions, document_ids=rows.document_ids)
    labels = torch.where(rows.loss_mask, rows.labels, -100)
    loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    for a, b in zip(ours, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_first_ratio_is_one_bit_for_bit() -> None:
    """Law On-policy, without strict mode: the same rows give the same bits with and without a graph."""
    scorer, rows = Scorer(drawn(), temperature=0.9), padded([8, 3, 5])
    with torch.no_grad():
        old = scorer(rows).log_probs
    assert torch.equal(scorer(rows).log_probs, old)


def test_a_reward_models_classes_are_read_at_the_last_real_token() -> None:
    model = drawn(dtype=torch.float64)
    scorer = Scorer(model, num_classes=2).double()
    batch = pairs()
    scores = scorer(batch)
    assert scorer.class_head is not None
    assert scorer.class_head.weight.shape == (2, 32)
    for row, (side, i) in enumerate(
        [(batch.chosen, 0), (batch.chosen, 1), (batch.chosen, 2)] + [(batch.rejected, i) for i in range(3)]
    ):
        length = int(side.document_ids[i].sum())
        alone = model(side.tokens[i : i + 1, :length])[0, -1] @ scorer.class_head.weight.T
        torch.testing.assert_close(scores.classes[row], alone, rtol=0, atol=1e-12)
    assert (scores.log_probs == 0).all()


def test_an_empty_row_still_has_a_finite_class() -> None:
    """Evaluation pads its last batch with rows of padding alone."""
    rows = padded([3, 0])
    assert torch.isfinite(Scorer(drawn(), num_classes=1)(rows).classes).all()


def test_a_critics_values_stand_on_every_state() -> None:
    model, rows = drawn(dtype=torch.float64), packed()
    scorer = Scorer(model, value_head=True).double()
    assert scorer.value_head is not None
    torch.nn.init.normal_(scorer.value_head.weight)
    hidden = model(rows.tokens, positions=rows.positions, document_ids=rows.document_ids)
    torch.testing.assert_close(scorer(rows).values, hidden @ scorer.value_head.weight[0], rtol=0, atol=1e-12)


def test_a_scorer_with_a_head_of_its_own_has_no_language_head() -> None:
    for scorer in (
        Scorer(drawn(replace(TINY, tied=False)), value_head=True),
        Scorer(drawn(replace(TINY, tied=False)), num_classes=3),
    ):
        assert not [name for name, _ in scorer.named_parameters() if name == "model.head.weight"]
        assert not scorer.scores_labels
    names = {logical_name(name) for name, _ in Scorer(drawn(replace(TINY, tied=False))).named_parameters()}
    assert names == {name for name, _ in drawn(replace(TINY, tied=False)).named_parameters()}


def test_a_pointwise_loss_runs_inside_and_its_answer_is_returned() -> None:
    rows = packed()
    scorer = Scorer(drawn())
    seen: list[Tensor] = []

    def loss(log_probs: Tensor, entropy: Tensor | None, same: Rows) -> tuple[Tensor, Metrics]:
        assert isinstance(same, TokenBatch)
        assert torch.equal(same.labels, rows.labels[rows.loss_mask])
        assert entropy is not None
        seen.append(log_probs)
        return -log_probs.sum(), {"loss": (-log_probs.sum(), torch.ones(()))}

    value, metrics = scorer(rows, token_loss=loss, with_entropy=True)
    plain = scorer(rows)
    assert isinstance(plain, Scores)
    assert torch.equal(seen[0], plain.log_probs[rows.loss_mask])
    assert torch.equal(value, -seen[0].sum())
    assert list(metrics) == ["loss"]


def test_nothing_to_predict_is_zero_with_zero_gradients() -> None:
    rows = padded([4, 2])
    rows = TokenBatch(rows.tokens, rows.labels, torch.zeros_like(rows.loss_mask), rows.positions, rows.document_ids)
    scorer = Scorer(drawn())
    log_probs = scorer(rows).log_probs
    assert (log_probs == 0).all()
    log_probs.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in scorer.parameters())


def test_only_token_rows_may_be_packed() -> None:
    rollout = Rollout(*[torch.zeros(1, 2)] * 9)
    assert one_document_a_row(pairs())
    assert one_document_a_row(rollout)
    assert not one_document_a_row(packed())


def test_bf16_scores_come_in_fp32() -> None:
    scorer = Scorer(drawn(dtype=torch.bfloat16), value_head=True).bfloat16()
    scores = scorer(padded([8, 4]))
    assert scores.values.dtype == torch.float32
    assert Scorer(drawn(dtype=torch.bfloat16))(padded([8, 4])).log_probs.dtype == torch.float32
