"""Rows cut, filled up and put together again: worked by hand, and the round trip for any sizes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.core.records import PreferenceBatch, Scores, TokenBatch
from framework.engine.micro_batches import MicroBatch, cut, fill_up, join, trim, without_empty
from tests.engine.cases import packed, pairs


def one_token_rows(*tokens: int) -> TokenBatch:
    """A row for each token; 0 is an empty row."""
    column = torch.tensor(tokens).reshape(-1, 1)
    return TokenBatch(column, column, column > 0, column * 0, (column > 0).long())


def test_three_rows_in_forwards_of_two() -> None:
    parts = list(cut(one_token_rows(5, 6, 7), size=2, number=3))
    assert [part.rows.inputs().tokens.flatten().tolist() for part in parts] == [[5, 6], [7, 0], [0, 0]]
    assert [part.filled for part in parts] == [2, 1, 0]
    assert parts[1].rows.inputs().loss_mask.flatten().tolist() == [True, False]
    assert parts[1].rows.inputs().document_ids.flatten().tolist() == [1, 0]


def test_no_rows_at_all_still_make_a_forward() -> None:
    (part,) = cut(one_token_rows(5).select(slice(0, 0)), size=2, number=1)
    assert (part.rows.inputs().tokens.flatten().tolist(), part.filled) == ([0, 0], 0)


def test_a_full_record_is_handed_on_untouched() -> None:
    rows = packed(2)
    assert fill_up(rows, 2) is rows
    assert without_empty(rows) is rows


def test_empty_rows_are_dropped_wherever_they_stand() -> None:
    assert without_empty(one_token_rows(0, 5, 0, 6, 0)).inputs().tokens.flatten().tolist() == [5, 6]
    both = PreferenceBatch(one_token_rows(5, 0, 6), one_token_rows(7, 0, 8), torch.tensor([1.0, 2.0, 3.0]))
    kept = without_empty(both)
    assert isinstance(kept, PreferenceBatch)
    assert kept.margin is not None
    assert (len(kept), kept.margin.tolist()) == (2, [1.0, 3.0])


def test_scores_of_pairs_are_trimmed_on_both_sides() -> None:
    """Rows c0 c1 r0 r1, the second pair a filler."""
    scores = Scores(log_probs=torch.zeros(4, 1), classes=torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    trimmed = trim(scores, pairs(2), 1)
    assert trimmed.classes is not None
    assert trimmed.classes.flatten().tolist() == [1.0, 3.0]
    assert trimmed.values is None


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 9), size=st.integers(1, 4), extra=st.integers(0, 2), paired=st.booleans())
def test_joined_scores_are_those_of_one_forward(count: int, size: int, extra: int, paired: bool) -> None:
    """A stand-in model scores a row by its tokens; cut, filled up and joined, nothing has moved."""

    def score(rows: MicroBatch) -> Scores:
        tokens = rows.rows.inputs().tokens.double()
        return Scores(log_probs=tokens, classes=tokens.sum(1, keepdim=True))

    rows = pairs(count) if paired else packed(count)
    parts = list(cut(rows, size, -(-count // size) + extra))
    joined, whole = join([(score(part), part) for part in parts]), score(MicroBatch(rows, count))
    assert torch.equal(joined.log_probs, whole.log_probs)
    assert joined.classes is not None
    assert whole.classes is not None
    assert torch.equal(joined.classes, whole.classes)
