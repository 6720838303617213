"""Pairs by hand: one width, the answers' labels masked in, the end token read as the last one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from framework.core.errors import DataError, UsageError
from framework.core.records import PreferenceBatch, Tokenizer
from framework.data.config import DataConfig
from framework.data.preference import open_rows, with_reference
from tests.data.conftest import Write

RECORDS = [
    {"prompt": "q", "chosen": "yo", "rejected": "n"},
    {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.5},
    {"prompt": "q", "chosen": "same", "rejected": "same"},
]


def test_by_hand(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    config = DataConfig(train=[write("a.jsonl", RECORDS)], max_tokens=9)
    rows = open_rows(config, "train", tokenizer, tmp_path, 0)
    batch = rows.rows(np.array([0, 1]))
    assert isinstance(batch, PreferenceBatch)
    q, y, o, n = (261 + ord(c) - ord("a") for c in "qyon")
    assert batch.chosen.tokens[0].tolist() == [1, 2, q, 1, 3, y, o, 1, 0]
    assert batch.chosen.labels[0].tolist() == [2, q, 1, 3, y, o, 1, 0, 0]
    assert batch.chosen.loss_mask[0].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert batch.chosen.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert batch.chosen.document_ids[0].tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert batch.rejected.tokens[0].tolist() == [1, 2, q, 1, 3, n, 1, 0, 0]
    assert batch.rejected.loss_mask[0].int().tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert batch.margin is not None
    assert batch.margin.tolist() == [0.0, 1.5]
    assert (len(rows), rows.num_tokens, rows.num_bytes) == (2, 5 + 4, 3 + 2)
    assert rows.skipped == {"chosen and rejected are equal": 1}
    assert rows.preview() == (
        "<|end|><|user|>q<|end|><|assistant|>«yo<|end|>»\n  is preferred to\n"
        "<|end|><|user|>q<|end|><|assistant|>«n<|end|>»"
    )


def test_the_last_token_read_is_always_the_end(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    records = [{"prompt": "p" * n, "chosen": "c" * (9 - n), "rejected": "r" * n} for n in range(1, 8)]
    rows = open_rows(DataConfig(train=[write("a.jsonl", records)], max_tokens=19), "train", tokenizer, tmp_path, 0)
    both = rows.rows(np.arange(7)).inputs()
    last = both.document_ids.sum(1) - 1
    assert both.tokens[np.arange(14), last].tolist() == [tokenizer.end_id] * 14
    assert rows.rows(np.arange(7)).margin is None


def test_either_side_may_be_too_long(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b" * 9}, RECORDS[0]])
    with pytest.raises(UsageError, match=r"1 of 2 samples .* set data\.max_tokens=15 to take all"):
        open_rows(DataConfig(train=[path], max_tokens=14), "train", tokenizer, tmp_path, 0)
    assert len(open_rows(DataConfig(train=[path], max_tokens=15), "train", tokenizer, tmp_path, 0)) == 2


def test_other_samples_are_named(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: this stage takes pairs"):
        open_rows(DataConfig(train=[write("a.jsonl", [{"text": "x"}])]), "train", tokenizer, tmp_path, 0)


@pytest.mark.parametrize("mixed", [False, True])
def test_pairs_carry_what_a_reference_says(tokenizer: Tokenizer, write: Write, tmp_path: Path, mixed: bool) -> None:
    paths = [write("a.jsonl", RECORDS[:2]), write("b.jsonl", RECORDS[:1])]
    config = DataConfig(train=paths, max_tokens=9, weights=[1.0, 2.0] if mixed else [])
    rows = open_rows(config, "train", tokenizer, tmp_path, 0)
    table = torch.arange(6.0).view(3, 2)
    batch = with_reference(rows, table).rows(np.array([2, 0, 1]))
    assert isinstance(batch, PreferenceBatch)
    assert batch.reference is not None
    assert batch.reference.tolist() == [[4, 5], [0, 1], [2, 3]]
    without = rows.rows(np.array([0]))
    assert isinstance(without, PreferenceBatch)
    assert without.reference is None


def test_a_fingerprint_names_rows_and_numbers(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    a, b, c = write("a.jsonl", RECORDS[:1]), write("b.jsonl", RECORDS[1:]), write("c.jsonl", RECORDS[:1])

    def fingerprint(paths: list[str], weights: tuple[float, ...] = (), max_tokens: int = 9) -> str:
        config = DataConfig(train=paths, max_tokens=max_tokens, weights=list(weights))
        return open_rows(config, "train", tokenizer, tmp_path, 0).fingerprint

    assert fingerprint([a]) == fingerprint([c])
    different = [fingerprint([a]), fingerprint([a], max_tokens=10), fingerprint([a, b]), fingerprint([b, a])]
    different += [fingerprint([a, b], (1, 2)), fingerprint([b, a], (1, 2))]
    assert len(set(different)) == len(different)
