"""Records: the worked examples of the docstrings are executed; splitting, joining, pytrees and alignment hold."""

import ast
import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from framework.core import records
from framework.core.records import (
    Counts,
    Experience,
    PreferenceBatch,
    PromptBatch,
    Rollout,
    Scores,
    TokenBatch,
    align,
    labels_of,
)

MASKS = {"loss_mask", "token_mask", "response_mask", "finished"}


def example(cls: type) -> dict[str, Tensor]:
    """Every `name [...]` of a docstring as a tensor."""
    found = re.findall(r"(\w+) +(\[\[.*?\]\]|\[[\w, ]+\])", cls.__doc__ or "")
    tensors = {name: torch.tensor(ast.literal_eval(text)) for name, text in found}
    return {name: x.bool() if name in MASKS else x for name, x in tensors.items()}


def rollout(rows: int = 1, **changes: Tensor) -> Rollout:
    fields = example(Rollout) | {"row": torch.tensor([40]), "sample": torch.tensor([0])} | changes
    made = Rollout(**fields)
    return Rollout.concat([made] * rows)


def token_batch(rows: int, length: int = 3) -> TokenBatch:
    tokens = torch.arange(rows * length).reshape(rows, length)
    return TokenBatch(tokens, tokens + 1, tokens % 2 == 0, tokens % length, torch.ones_like(tokens))


def test_the_token_batch_example_is_two_packed_documents() -> None:
    shown = example(TokenBatch)
    batch = TokenBatch(**shown)
    assert set(shown) == {f.name for f in dataclasses.fields(TokenBatch) if f.default is dataclasses.MISSING}
    for row in range(len(batch)):
        for t in range(batch.tokens.shape[1]):
            document = batch.document_ids[row, t]
            before = (batch.document_ids[row, :t] == document).sum()
            goes_on = t + 1 < batch.tokens.shape[1] and batch.document_ids[row, t + 1] == document
            assert batch.loss_mask[row, t] == (document > 0)
            if document > 0:
                assert batch.positions[row, t] == before
                assert batch.labels[row, t] == (batch.tokens[row, t + 1] if goes_on else 9)


def test_the_rollout_example_reads_as_its_text_says() -> None:
    shown = example(Rollout)
    assert {f.name for f in dataclasses.fields(Rollout)} == set(shown) | {"row", "sample"}
    made = rollout()
    assert made.tokens[made.response_mask].tolist() == [4, 9]
    assert made.tokens[made.token_mask & ~made.response_mask].tolist() == [7, 8]
    assert made.positions[made.token_mask].tolist() == [0, 1, 2, 3]
    assert (made.log_probs[~made.response_mask] == 0).all()
    assert (made.policy_version[made.response_mask] == 3).all()


def test_a_rollout_is_read_as_shifted_rows() -> None:
    inputs = rollout().inputs()
    assert inputs.labels.tolist() == [[8, 4, 9, 0, 0]]
    assert inputs.loss_mask.tolist() == [[False, True, True, False, False]]
    assert inputs.document_ids.tolist() == [[1, 1, 1, 1, 0]]
    assert inputs.positions.tolist() == [[0, 1, 2, 3, 0]]
    # The labels that count are the response, and their scores come back to the response's places.
    assert inputs.labels[inputs.loss_mask].tolist() == [4, 9]
    assert torch.equal(align(inputs.loss_mask), rollout().response_mask)
    assert torch.equal(align(inputs.labels)[:, 1:], rollout().tokens[:, 1:])


def test_the_prompt_example_pads_on_the_right() -> None:
    batch = PromptBatch(**example(PromptBatch))
    assert [row[mask].tolist() for row, mask in zip(batch.tokens, batch.token_mask)] == [[7, 8], [5]]
    assert batch.row.tolist() == [40, 41]


def test_the_experience_example_follows_from_the_objectives() -> None:
    """KL coefficient 0.1, score 1.0, gamma = lambda = 1; by the formulas of the papers, written out."""
    shown = example(Experience)
    mask = rollout().response_mask
    kl = shown["old_log_probs"] - shown["reference_log_probs"]
    rewards = -0.1 * kl * mask
    rewards[0, 3] += 1.0
    assert torch.allclose(shown["rewards"], rewards)
    to_go = rewards.flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(shown["returns"], to_go)
    assert torch.allclose(shown["advantages"], to_go - shown["values"])


@pytest.mark.parametrize("cls", [TokenBatch, PreferenceBatch, PromptBatch, Rollout, Experience, Scores, Counts])
def test_every_tensor_record_is_a_frozen_pytree(cls: type) -> None:
    fields = dataclasses.fields(cls)
    made = cls(*(torch.full((2, 1), float(i)) for i in range(len(fields))))
    leaves, shape = pytree.tree_flatten(made)
    assert [float(leaf[0]) for leaf in leaves] == list(range(len(fields)))
    again = pytree.tree_unflatten(leaves, shape)
    assert type(again) is cls
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.anything = 1


def test_a_preference_batch_is_read_as_chosen_then_rejected() -> None:
    pairs = PreferenceBatch(token_batch(2), token_batch(2).select(torch.tensor([1, 0])))
    assert len(pairs) == 2
    assert pairs.inputs().tokens.tolist() == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [0, 1, 2]]
    assert pairs.split(1)[1].chosen.tokens.tolist() == [[3, 4, 5]]
    assert pairs.split(1)[0].margin is None


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 10))
def test_split_and_concat_are_inverse(rows: int, size: int) -> None:
    plain = token_batch(rows)
    types, source = plain.positions % 2, token_batch(rows, 5)
    batch = dataclasses.replace(plain, prefix_lengths=plain.positions + 1, token_types=types, source=source)
    parts = batch.split(size)
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert 1 <= len(parts[-1]) <= size
    again = TokenBatch.concat(parts)
    assert again.span_positions is None
    leaves = zip(pytree.tree_leaves(again), pytree.tree_leaves(batch), strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in leaves)


def test_select_takes_positions_masks_and_slices_through_nested_records() -> None:
    experience = Experience(rollout(3, row=torch.tensor([5])), *(torch.arange(15.0).reshape(3, 5) for _ in range(6)))
    by_position = experience.select(torch.tensor([2, 0]))
    by_mask = experience.select(torch.tensor([True, False, True]))
    assert by_position.values[:, 0].tolist() == [10, 0]
    assert by_mask.values[:, 0].tolist() == [0, 10]
    assert experience.select(slice(1, None)).rollout.tokens.shape == (2, 5)
    assert by_position.rollout.row.tolist() == [5, 5]


def test_to_moves_every_tensor_and_keeps_none() -> None:
    moved = Scores(torch.zeros(1, 2), values=torch.zeros(1, 2)).to("meta")
    assert moved.log_probs.device.type == "meta"
    assert moved.values is not None
    assert moved.values.device.type == "meta"
    assert moved.entropy is None


def test_align_moves_one_step_right_and_forgets_the_last() -> None:
    assert align(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist() == [[0, 1, 2], [0, 4, 5]]
    assert align(torch.tensor([[True, False]])).tolist() == [[False, True]]


def test_labels_of_a_packed_row_by_hand() -> None:
    batch = TokenBatch(
        tokens=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]),
        labels=torch.tensor([[2, 9, 4, 9], [6, 7, 9, 0]]),
        loss_mask=torch.tensor([[True, False, True, True], [False, True, False, False]]),
        positions=torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]]),
        document_ids=torch.tensor([[1, 1, 2, 2], [1, 1, 1, 0]]),
        source=token_batch(2),
    )
    found = labels_of(batch)
    assert isinstance(found, TokenBatch)
    assert found.labels.tolist() == [2, 4, 9, 7]
    assert found.tokens.tolist() == [1, 3, 4, 6]
    assert found.positions.tolist() == [0, 0, 1, 1]
    assert found.loss_mask.all()
    assert found.source is None
    pairs = PreferenceBatch(batch, batch, margin=torch.ones(2))
    assert labels_of(pairs).inputs().labels.tolist() == [2, 4, 9, 7, 2, 4, 9, 7]


def test_labels_of_rl_records_stand_in_the_order_of_their_inputs() -> None:
    """Entry m of both speaks of one and the same label, though one stands at token positions, the other before."""
    shape, random = (5, 5), torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=random) < 0.4
    mask[:, 0] = False
    tokens = torch.randint(100, shape, generator=random)
    drawn = dataclasses.replace(rollout(5), response_mask=mask, tokens=tokens, row=torch.arange(5))
    wave = torch.arange(25.0).reshape(shape)
    batch = Experience(drawn, *(wave + 100 * n for n in range(6)))
    found = labels_of(batch)
    assert isinstance(found, Experience)
    inputs = batch.inputs()
    assert torch.equal(found.rollout.tokens, inputs.labels[inputs.loss_mask])
    assert torch.equal(found.old_log_probs, wave[mask])
    assert torch.equal(found.returns, wave[mask] + 500)
    assert torch.equal(found.rollout.row, mask.nonzero()[:, 0])


def test_counts_are_of_labels_rows_and_pairs() -> None:
    batch = token_batch(3)
    assert records.count(batch).tokens.tolist() == [5]
    assert records.count(batch).sequences.tolist() == [3]
    assert records.count(batch).pairs.tolist() == [0]
    pairs = records.count(PreferenceBatch(batch, batch))
    assert (pairs.tokens.tolist(), pairs.sequences.tolist(), pairs.pairs.tolist()) == ([10], [3], [3])
    assert records.count(rollout(2)).tokens.tolist() == [4]


def test_whole_is_the_box_of_everything() -> None:
    assert records.whole(torch.Size([2, 3])) == ((0, 2), (0, 3))
    assert records.whole(()) == ()
