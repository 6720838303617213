"""Objectives that hide: worked by hand, pure functions of a row's place, shares as told."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from framework.core.errors import UsageError
from framework.core.records import TokenBatch
from framework.data.config import LanguageConfig, Objective
from framework.data.denoising import masked, shaped_by, with_prompts, with_random_prefixes

MASK, VOCABULARY = 36, 37
#                           a  b  c  d     e  f        padding
ROWS = TokenBatch(
    tokens=torch.tensor([[11, 12, 13, 14, 21, 22, 0]]),
    labels=torch.tensor([[12, 13, 14, 9, 22, 9, 0]]),
    loss_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 0]]).bool(),
    positions=torch.tensor([[0, 1, 2, 3, 0, 1, 0]]),
    document_ids=torch.tensor([[1, 1, 1, 1, 2, 2, 0]]),
)


def many(count: int = 400, width: int = 32) -> TokenBatch:
    x = torch.randint(0, VOCABULARY - 1, (count, width), generator=torch.Generator().manual_seed(0))
    places = torch.arange(width).expand(count, -1)
    return TokenBatch(x, x.roll(-1, 1), torch.ones_like(x).bool(), places, torch.ones_like(x))


def test_masked_by_hand() -> None:
    """Of a b c d: b is hidden, c read as 7 (0.2 x 37 = 7.4), d read as it is; a, the first, is always read."""
    chosen = torch.tensor([[0.0, 0.1, 0.1, 0.1, 0.0, 0.9, 0.0]])
    kind = torch.tensor([[0.0, 0.79, 0.85, 0.95, 0.0, 0.0, 0.0]])
    got = masked(ROWS, chosen, kind, torch.full((1, 7), 0.2), LanguageConfig(), MASK, VOCABULARY)
    assert got.tokens.tolist() == [[11, MASK, 7, 14, 21, 22, 0]]
    assert got.loss_mask.int().tolist() == [[0, 1, 1, 1, 0, 0, 0]]
    assert torch.equal(got.labels, ROWS.tokens)  # each predicts itself
    assert torch.equal(got.document_ids, ROWS.document_ids)


def test_prefixes_by_hand() -> None:
    """Draw 0.5: of four tokens three are seen whole, so the third predicts what follows; of two tokens both."""
    got = with_random_prefixes(ROWS, torch.full((1, 7), 0.5))
    assert got.prefix_lengths is not None
    assert got.prefix_lengths.tolist() == [[3, 3, 3, 3, 2, 2, 0]]
    assert got.loss_mask.int().tolist() == [[0, 0, 1, 1, 0, 1, 0]]
    assert torch.equal(got.labels, ROWS.labels)


def test_the_prompt_of_a_conversation_is_its_prefix() -> None:
    answered = replace(ROWS, loss_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 0]]).bool())
    got = with_prompts(answered)
    assert got.prefix_lengths is not None
    assert got.prefix_lengths.tolist() == [[3, 3, 3, 3, 1, 1, 0]]
    assert torch.equal(got.loss_mask, answered.loss_mask)


def test_a_document_without_a_trained_token_predicts_nothing() -> None:
    got = with_prompts(replace(ROWS, loss_mask=torch.zeros(1, 7).bool()))
    assert not got.loss_mask.any()


def test_the_shares_are_as_told() -> None:
    rows = many()
    shape = shaped_by(LanguageConfig(share=0.2), Objective.MASKED, MASK, VOCABULARY, 0)
    got = shape(rows, np.arange(len(rows)))
    inner = rows.positions > 0
    hidden = got.loss_mask & inner
    assert not (got.loss_mask & ~inner).any()
    n = int(inner.sum())
    assert abs(float(hidden.sum()) / n - 0.2) < 4 * (0.2 * 0.8 / n) ** 0.5
    m = int(hidden.sum())
    as_mask = float((got.tokens[hidden] == MASK).float().mean())
    kept = float((got.tokens[hidden] == rows.tokens[hidden]).float().mean())
    assert abs(as_mask - (0.8 + 0.1 / 37)) < 4 * (0.16 / m) ** 0.5
    assert abs(kept - (0.1 + 0.1 / 37)) < 4 * (0.09 / m) ** 0.5
    assert torch.equal(got.tokens[~hidden], rows.tokens[~hidden])


def test_prefixes_are_uniform_over_a_document() -> None:
    rows = many(4000, 8)
    shape = shaped_by(LanguageConfig(), Objective.PREFIX, None, VOCABULARY, 0)
    lengths = shape(rows, np.arange(len(rows))).prefix_lengths
    assert lengths is not None
    counts = torch.bincount(lengths[:, 0], minlength=9)
    assert counts[0] == 0
    assert (counts[1:] - 500).abs().max() < 5 * (500 * 7 / 8) ** 0.5


@pytest.mark.parametrize("objective", [Objective.MASKED, Objective.PREFIX])
def test_a_row_is_a_function_of_its_place_alone(objective: Objective) -> None:
    """However the rows are batched; other places and other seeds hide other tokens."""
    rows, shape = many(12), shaped_by(LanguageConfig(), objective, MASK, VOCABULARY, 0)
    whole = shape(rows, np.arange(100, 112))
    parts = TokenBatch.concat([shape(rows.select(slice(a, a + 4)), np.arange(100 + a, 104 + a)) for a in (0, 4, 8)])
    for name in ("tokens", "labels", "loss_mask"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    later = shape(rows, np.arange(200, 212))
    other = shaped_by(LanguageConfig(), objective, MASK, VOCABULARY, 1)(rows, np.arange(100, 112))
    assert not torch.equal(whole.loss_mask, later.loss_mask)
    assert not torch.equal(whole.loss_mask, other.loss_mask)


def test_the_next_token_hides_nothing() -> None:
    assert shaped_by(LanguageConfig(), Objective.CAUSAL, None, VOCABULARY, 0)(ROWS, np.arange(1)) is ROWS


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"share": 0.0}, r"language\.share=0\.0 must be between 0 and 1"),
        ({"masked": 0.9, "random": 0.2}, r"language\.masked=0\.9 and language\.random=0\.2"),
    ],
)
def test_shares_that_cannot_be_are_refused(words: dict[str, float], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        LanguageConfig(**words)  # type: ignore[arg-type]
