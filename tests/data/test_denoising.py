"""Objectives that hide: worked by hand, pure functions of a row's place, shares as told."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.core.errors import UsageError
from framework.core.records import TokenBatch
from framework.data.config import LanguageConfig, Objective
from framework.data.denoising import masked, shaped_by, with_prompts, with_random_prefixes
from framework.data.spans import Marks, with_blanks, without_spans

MASK, VOCABULARY = 36, 37
MARKS = Marks(VOCABULARY, end_id=1, start_id=0, mask_id=MASK, sentinel_ids=(35, 34, 33))
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
    got = masked(ROWS, chosen, kind, torch.full((1, 7), 0.2), LanguageConfig(), MARKS)
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
    shape = shaped_by(LanguageConfig(share=0.2), Objective.MASKED, MARKS, 0)
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
    shape = shaped_by(LanguageConfig(), Objective.PREFIX, MARKS, 0)
    lengths = shape(rows, np.arange(len(rows))).prefix_lengths
    assert lengths is not None
    counts = torch.bincount(lengths[:, 0], minlength=9)
    assert counts[0] == 0
    assert (counts[1:] - 500).abs().max() < 5 * (500 * 7 / 8) ** 0.5


@pytest.mark.parametrize("objective", [Objective.MASKED, Objective.PREFIX, Objective.SPANS, Objective.BLANKS])
def test_a_row_is_a_function_of_its_place_alone(objective: Objective) -> None:
    """However the rows are batched; other places and other seeds hide other tokens."""
    rows, shape = many(12), shaped_by(LanguageConfig(), objective, MARKS, 0)
    whole = shape(rows, np.arange(100, 112))
    parts = TokenBatch.concat([shape(rows.select(slice(a, a + 4)), np.arange(100 + a, 104 + a)) for a in (0, 4, 8)])
    for name in ("tokens", "labels", "loss_mask"):
        a, b = getattr(whole, name), getattr(parts, name)
        assert torch.equal(a[:, : b.shape[1]], b[:, : a.shape[1]])
    later = shape(rows, np.arange(200, 212))
    other = shaped_by(LanguageConfig(), objective, MARKS, 1)(rows, np.arange(100, 112))
    changes = [(x.labels, x.loss_mask) for x in (whole, later, other)]
    assert not any(torch.equal(changes[0][0][changes[0][1]], labels[mask]) for labels, mask in changes[1:])


def test_spans_by_hand() -> None:
    """Of ten tokens three are hidden (0.3) in two spans (mean 1.5). Hidden 3 = 2 + 1, for the second draw is the
    smaller of two; read 7 = 2 + 5, for of six draws the second is the least."""
    text = torch.arange(11, 21).unsqueeze(0)
    rows = TokenBatch(text, text, torch.ones(1, 10).bool(), torch.arange(10).unsqueeze(0), torch.ones_like(text))
    draws = torch.tensor([[[0.9, 0.1, *[0.5] * 8]]] * 3)
    got = without_spans(rows, draws, LanguageConfig(share=0.3, span=1.5), MARKS)
    assert got.source is not None
    assert got.source.tokens.tolist() == [[11, 12, 35, 15, 16, 17, 18, 19, 34, 1, 0, 0, 0, 0, 0, 0]]
    assert got.source.document_ids.tolist() == [[1] * 10 + [0] * 6]
    assert not got.source.loss_mask.any()
    assert got.labels.tolist() == [[35, 13, 14, 34, 20, 1, 0, 0]]
    assert got.tokens.tolist() == [[0, 35, 13, 14, 34, 20, 0, 0]]
    assert got.loss_mask.int().tolist() == [[1] * 6 + [0] * 2]
    assert got.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]


def test_blanks_by_hand() -> None:
    """ "a b c d e f" with c and e f hidden, the second one first: the example of the docstring."""
    text = torch.tensor([[11, 12, 13, 14, 15, 16]])
    rows = TokenBatch(text, text, torch.ones(1, 6).bool(), torch.arange(6).unsqueeze(0), torch.ones_like(text))
    # three hidden in two spans, 1 + 2; three read and none behind them, of 4 = 2 + 1 + 1 in three parts
    draws = torch.tensor([[[0.1, 0.9, *[0.5] * 4]], [[0.9, 0.1, 0.2, *[0.5] * 3]], [[0.9, 0.1, *[0.5] * 4]]])
    got = with_blanks(rows, draws, LanguageConfig(share=0.5, span=1.5), MARKS)
    m, start, end = MASK, MARKS.start_id, MARKS.end_id
    assert got.tokens[0, :10].tolist() == [11, 12, m, 14, m, start, 15, 16, start, 13]
    assert got.labels[0, 5:10].tolist() == [15, 16, end, 13, end]
    assert got.loss_mask[0, :10].tolist() == [False] * 5 + [True] * 5
    assert got.positions[0, :10].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 2, 2]
    assert got.span_positions is not None
    assert got.span_positions[0, :10].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
    assert got.prefix_lengths is not None
    assert got.prefix_lengths[0, :10].tolist() == [5] * 10
    assert not got.document_ids[0, 10:].any()


def filled_in(got: TokenBatch, mine: torch.Tensor) -> list[int]:
    """The text of a document whose blanks its spans fill."""
    assert got.span_positions is not None
    spans: dict[int, list[int]] = {}
    for place, inner, label in zip(*(x[mine].tolist() for x in (got.positions, got.span_positions, got.labels))):
        if inner and label != MARKS.end_id:
            spans.setdefault(place, []).append(label)
    read = got.tokens[mine & (got.span_positions == 0)].tolist()
    return [x for place, token in enumerate(read) for x in (spans[place] if token == MASK else [token])]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=4), st.floats(0.05, 0.9), st.floats(1, 6), st.integers(0, 99))
def test_filled_blanks_are_the_text(sizes: list[int], share: float, span: float, place: int) -> None:
    ids = torch.tensor([[n for n, size in enumerate(sizes, 1) for _ in range(size)] + [0, 0]])
    places = torch.tensor([[p for size in sizes for p in range(size)] + [0, 0]])
    text = torch.randint(2, 30, ids.shape) * (ids > 0)
    rows = TokenBatch(text, text, ids > 0, places, ids)
    got = shaped_by(LanguageConfig(share=share, span=span), Objective.BLANKS, MARKS, 0)(rows, np.array([place]))
    assert got.span_positions is not None
    assert torch.equal(got.loss_mask, got.span_positions > 0)
    for number, size in enumerate(sizes, 1):
        mine = got.document_ids == number
        assert filled_in(got, mine) == text[ids == number].tolist()
        hidden = int((got.loss_mask & mine & (got.labels != MARKS.end_id)).sum())
        assert hidden == min(max(round(size * share), 1), size - 1)
        assert got.positions[mine].max() < got.prefix_lengths[mine].max()  # type: ignore[index]


def put_together(read: list[int], written: list[int]) -> list[int]:
    """The text that a pair was made of."""
    found, parts = [], [[]]  # type: ignore[var-annotated]
    for token in written[:-1]:
        if token in MARKS.sentinel_ids:
            parts.append([])
        else:
            parts[-1].append(token)
    for token in read[:-1]:
        found += parts[1 + MARKS.sentinel_ids.index(token)] if token in MARKS.sentinel_ids else [token]
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.floats(0.05, 0.9), st.floats(1, 6), st.integers(0, 99))
def test_what_is_written_fits_what_is_read(sizes: list[int], share: float, span: float, place: int) -> None:
    """Put together they are the text, document by document; as much is hidden as told; ends are ended."""
    ids = torch.tensor([[n for n, size in enumerate(sizes, 1) for _ in range(size)] + [0, 0]])
    places = torch.tensor([[p for size in sizes for p in range(size)] + [0, 0]])
    text = torch.randint(2, 30, ids.shape) * (ids > 0)
    rows = TokenBatch(text, text, ids > 0, places, ids)
    shape = shaped_by(LanguageConfig(share=share, span=span), Objective.SPANS, MARKS, 0)
    got = shape(rows, np.array([place]))
    assert got.source is not None
    kept = [n for n, size in enumerate(sizes, 1) if size > 1]
    assert int(got.document_ids.max()) == int(got.source.document_ids.max()) == len(kept)
    for number, original in enumerate(kept, 1):
        mine, theirs = got.document_ids == number, got.source.document_ids == number
        read, written = got.source.tokens[theirs].tolist(), got.labels[mine].tolist()
        assert put_together(read, written) == text[ids == original].tolist()
        assert read[-1] == written[-1] == MARKS.end_id
        assert got.tokens[mine].tolist() == [MARKS.start_id, *written[:-1]]
        size = sizes[original - 1]
        hidden = sum(token not in MARKS.sentinel_ids for token in written[:-1])
        assert hidden == min(max(round(size * share), 1), size - 1)
        assert got.loss_mask[mine].all()


def test_every_way_to_cut_is_as_likely() -> None:
    """Four tokens in two spans: 1 + 3, 2 + 2, 3 + 1."""
    rows = replace(many(3000, 8), tokens=many(3000, 8).tokens % 30)  # no sentinel stands in a text
    config = LanguageConfig(share=0.5, span=2.0)
    got = shaped_by(config, Objective.SPANS, MARKS, 0)(rows, np.arange(len(rows)))
    second = (got.labels == MARKS.sentinel_ids[1]).int().argmax(1)  # behind the first span
    counts = torch.bincount(second, minlength=5)
    assert counts[:2].sum() == 0
    assert (counts[2:5] - 1000).abs().max() < 5 * (1000 * 2 / 3) ** 0.5


def test_the_next_token_hides_nothing() -> None:
    assert shaped_by(LanguageConfig(), Objective.CAUSAL, MARKS, 0)(ROWS, np.arange(1)) is ROWS


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
