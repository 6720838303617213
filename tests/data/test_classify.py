"""Texts with labels by hand: one width, the end token behind each text, types of a pair, and what labels mean."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framework.core.errors import DataError, UsageError
from framework.core.records import ClassBatch, Tokenizer
from framework.data.classify import Targets, open_rows, read_targets
from framework.data.config import ClassifyConfig, DataConfig
from framework.data.loader import Loader
from tests.data.conftest import Write

A, B, C = (261 + n for n in range(3))
BEGIN = END = 1


def one(label: Any, text: str = "a") -> dict[str, Any]:
    return {"text": text, "label": label}


def targets(path: str, **words: Any) -> Targets:
    return read_targets(DataConfig(train=[path]), ClassifyConfig(**words))


def test_by_hand(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    records = [one("pos", "ab"), {"sentence1": "a", "sentence2": "bc", "label": "neg"}, one("neg", " ")]
    config = DataConfig(train=[write("a.jsonl", records)], max_tokens=8)
    words = read_targets(config, ClassifyConfig())
    rows = open_rows(words, 2, config, "train", tokenizer, tmp_path, 0)
    assert rows.skipped == {"empty text": 1}
    assert rows.num_tokens == 4 + 6
    batch = rows.rows(np.array([1, 0]))
    assert isinstance(batch, ClassBatch)
    assert batch.rows.tokens.tolist() == [[BEGIN, A, END, B, C, END, 0, 0], [BEGIN, A, B, END, 0, 0, 0, 0]]
    assert batch.rows.token_types is not None
    assert batch.rows.token_types.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0] * 8]
    assert batch.rows.document_ids.tolist() == [[1] * 6 + [0] * 2, [1] * 4 + [0] * 4]
    assert batch.rows.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert not batch.rows.loss_mask.any()
    assert torch.equal(batch.label, torch.tensor([0, 1]))
    assert rows.preview() == "<|end|>ab<|end|>\n  is labelled pos"
    plain = open_rows(words, 0, config, "train", tokenizer, tmp_path, 0).rows(np.array([0]))
    assert isinstance(plain, ClassBatch)
    assert plain.rows.token_types is None


def test_numbers_are_predicted_as_they_are(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    config = DataConfig(train=[write("a.jsonl", [one(1.5), one(-2)])], max_tokens=4)
    rows = open_rows(read_targets(config, ClassifyConfig()), 0, config, "train", tokenizer, tmp_path, 0)
    batch = rows.rows(np.array([0, 1]))
    assert isinstance(batch, ClassBatch)
    assert torch.equal(batch.label, torch.tensor([1.5, -2.0]))
    assert rows.preview().endswith("is labelled 1.5")


def test_other_classes_are_prepared_anew(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    config = DataConfig(train=[write("a.jsonl", [one("x"), one("y")])], max_tokens=4)
    first = open_rows(Targets(("x", "y")), 0, config, "train", tokenizer, tmp_path, 0).rows(np.array([0]))
    other = open_rows(Targets(("y", "x")), 0, config, "train", tokenizer, tmp_path, 0).rows(np.array([0]))
    assert isinstance(first, ClassBatch)
    assert isinstance(other, ClassBatch)
    assert (int(first.label), int(other.label)) == (0, 1)


def test_mixed_and_over_data_ranks_and_micro_batches_they_stay_whole(
    tokenizer: Tokenizer, write: Write, tmp_path: Path
) -> None:
    paths = [write("a.jsonl", [one("x"), one("y")]), write("b.jsonl", [one("y", "b"), one("x", "b"), one("y", "c")])]
    config = DataConfig(train=paths, max_tokens=4, weights=[1.0, 1.0])
    rows = open_rows(Targets(("x", "y")), 0, config, "train", tokenizer, tmp_path, 0)
    assert rows.rows(np.array([4, 0])).label.tolist() == [1, 0]  # type: ignore[union-attr]
    parts = [list(Loader(rows, 4, 0, rank, 2).evaluation_batches()) for rank in (0, 1)]
    last = [part[-1] for part in parts]
    assert [int((batch.rows.document_ids > 0).any(1).sum()) for batch in last] == [1, 0]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 2, 2], ("2", "10")),
        ([True, False], ("false", "true")),
        (["a", 3], ("3", "a")),
        ([0.5, 1], ()),
        ([1.0, 2.0], ()),
    ],
)
def test_labels_are_recognised(write: Write, labels: list[Any], expected: tuple[str, ...]) -> None:
    assert targets(write("a.jsonl", [one(label) for label in labels])).words == expected


def test_what_the_recipe_says_of_labels(write: Write) -> None:
    path = write("a.jsonl", [one("b"), one("a")])
    assert targets(path, labels=["b", "c", "a"]).words == ("b", "c", "a")
    assert targets(write("n.jsonl", [one(4), one(5)]), regression=True).words == ()
    assert targets(path, labels=["b", "a"]).told() == "2 classes: b, a"


@pytest.mark.parametrize(
    ("labels", "words", "line"),
    [
        (["a", "a"], {}, "data.train has one label alone, 'a'; a classifier needs at least two"),
        ([0.5, "good"], {}, "a.jsonl:2: label 'good' is a word, where others are fractions"),
        (["1", "2"], {"regression": True}, "a.jsonl:1: label '1' is a word, where others are fractions or classify."),
        ([1, 2.5], {"regression": False}, "a.jsonl:2: label 2.5 is a fraction and no class; write classes as words"),
        (["a", "b"], {"labels": ["a", "c"]}, "a.jsonl:2: label 'b' is not in classify.labels: a, c"),
        (["a", None], {}, "a.jsonl:2: needs the field 'label'; the record has text"),
        (["a", ["b"]], {}, "a.jsonl:2: field 'label' must be a word or a number, got list \"['b']\""),
    ],
)
def test_labels_that_cannot_be_are_one_line(write: Write, labels: list[Any], words: dict[str, Any], line: str) -> None:
    path = write("a.jsonl", [one(label) for label in labels])
    with pytest.raises(UsageError) as error:
        targets(path, **words)
    assert line in str(error.value)


def test_what_rows_refuse(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    train, valid = write("a.jsonl", [one("x"), one("y")]), write("b.jsonl", [one("x"), one("z")])
    config = DataConfig(train=[train], valid=[valid], max_tokens=4)
    with pytest.raises(DataError, match=r"b\.jsonl:2: label 'z' is none that data\.train has: x, y"):
        open_rows(Targets(("x", "y")), 0, config, "valid", tokenizer, tmp_path, 0)
    with pytest.raises(DataError, match=r"b\.jsonl:1: label 'x' is a word where numbers are to be predicted"):
        open_rows(Targets(()), 0, config, "valid", tokenizer, tmp_path, 0)
    long = DataConfig(train=[write("c.jsonl", [one("x", "abcde"), one("y")])], max_tokens=4)
    with pytest.raises(UsageError, match=r"1 of 2 samples .* set data\.max_tokens=7 to take all"):
        open_rows(Targets(("x", "y")), 0, long, "train", tokenizer, tmp_path, 0)
    texts = DataConfig(train=[write("d.jsonl", [{"text": "a"}])])
    with pytest.raises(DataError, match=r"d\.jsonl:1: classify takes texts with a label"):
        read_targets(texts, ClassifyConfig())
