"""Splitting and joining: every row is answered once, in order, whatever the layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import StandIn, prompts

from framework.cluster.marks import Answer, Layout, Mark, join, mark_of, share_out
from framework.core.errors import UsageError
from framework.core.records import PromptBatch

ROWS = Mark(split=True, answer=Answer.ROWS)
layouts = st.builds(
    lambda data_size, peers, interleaved: Layout(
        tuple(r % data_size if interleaved else r // peers for r in range(data_size * peers))
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 13), st.integers(1, 3), layouts)
def test_split_then_join_is_the_identity(rows: int, samples: int, layout: Layout) -> None:
    batch = prompts(rows)
    calls, asked = share_out(ROWS, ((batch, samples), {"seed": 5}), layout)
    answers = [part.select(torch.arange(len(part)).repeat_interleave(n)) for (part, n), _ in calls]

    joined = join(ROWS, answers, layout, asked)

    assert isinstance(joined, PromptBatch)
    assert joined.row.tolist() == [r for r in range(rows) for _ in range(samples)]
    assert torch.equal(joined.tokens, batch.tokens.repeat_interleave(samples, dim=0))
    assert all(kwargs == {"seed": 5} for _, kwargs in calls)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 13), layouts)
def test_shares_are_equal_and_peers_get_the_same_rows(rows: int, layout: Layout) -> None:
    calls, _ = share_out(ROWS, ((prompts(rows),), {}), layout)
    by_rank = [call[0][0].row.tolist() for call in calls]
    assert len({len(share) for share in by_rank}) == 1
    for rank, data_rank in enumerate(layout.data_ranks):
        assert by_rank[rank] == by_rank[layout.speakers[data_rank]]


def test_a_worked_example_of_padding() -> None:
    """Five rows over two data ranks of two peers: 0 1 2 | 3 4 4, and the copy's answer is dropped."""
    layout = Layout((0, 0, 1, 1))
    calls, rows = share_out(ROWS, ((prompts(5),), {}), layout)
    assert [call[0][0].row.tolist() for call in calls] == [[0, 1, 2], [0, 1, 2], [3, 4, 4], [3, 4, 4]]
    ranks = [torch.full((3,), float(rank)) for rank in range(4)]
    assert join(ROWS, ranks, layout, rows).tolist() == [0, 0, 0, 2, 2]


def test_reduced_calls_refuse_rows_that_do_not_divide() -> None:
    mark = Mark(split=True, answer=Answer.FIRST)
    with pytest.raises(UsageError, match="5 rows cannot be split evenly over 2 data ranks"):
        share_out(mark, ((prompts(5),), {}), Layout((0, 1)))
    calls, _ = share_out(mark, ((prompts(4),), {}), Layout((0, 1)))
    assert [call[0][0].row.tolist() for call in calls] == [[0, 1], [2, 3]]


def test_several_records_must_have_one_length() -> None:
    with pytest.raises(UsageError, match=r"one length above zero, got \[3, 4\]"):
        share_out(ROWS, ((prompts(3), prompts(4)), {}), Layout((0, 1)))


def test_answers_of_unsplit_calls() -> None:
    layout = Layout((0, 1))
    assert join(Mark(False, Answer.FIRST), ["a", "b"], layout, 0) == "a"
    assert join(Mark(False, Answer.LIST), ["a", "b"], layout, 0) == ["a", "b"]
    with pytest.raises(TypeError, match="must answer a Tensor or a Record, got dict"):
        join(ROWS, [{}, {}], layout, 2)


def test_marks_are_found_and_missing_ones_explained() -> None:
    assert mark_of(StandIn, "squares") == ROWS
    with pytest.raises(AttributeError, match=r"StandIn.unmarked carries no mark.*mark it with split_rows"):
        mark_of(StandIn, "unmarked")
    with pytest.raises(AttributeError, match="did you mean 'squares'"):
        mark_of(StandIn, "square")
