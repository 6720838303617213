"""Prompts by hand, and lent by conversations and pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framework.core.errors import DataError, UsageError
from framework.core.records import PromptBatch, Tokenizer
from framework.data.config import DataConfig
from framework.data.prompts import open_rows
from tests.data.conftest import Write


def test_by_hand(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", [{"prompt": "ab"}, {"prompt": "c", "answer": "x"}, {"prompt": " "}])
    rows = open_rows(DataConfig(train=[path], max_tokens=6), "train", tokenizer, tmp_path, 0)
    batch = rows.rows(np.array([1, 0]))
    assert isinstance(batch, PromptBatch)
    assert batch.tokens.tolist() == [[1, 2, 263, 1, 3, 0], [1, 2, 261, 262, 1, 3]]
    assert batch.token_mask.int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch.row.tolist() == [1, 0]
    assert (len(rows), rows.num_tokens, rows.num_bytes) == (2, 11, 3)
    assert rows.skipped == {"empty prompt": 1}
    assert rows.preview() == "<|end|><|user|>ab<|end|><|assistant|>"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "ab", "chosen": "c", "rejected": "d"},
        {"instruction": "ab", "output": "c"},
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "user", "content": "ab"}]},
    ],
)
def test_conversations_and_pairs_lend_their_prompts(
    tokenizer: Tokenizer, write: Write, tmp_path: Path, record: Any
) -> None:
    rows = open_rows(DataConfig(train=[write("a.jsonl", [record])], max_tokens=8), "train", tokenizer, tmp_path, 0)
    assert rows.preview() == "<|end|><|user|>ab<|end|><|assistant|>"


def test_refusals(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", [{"prompt": "abcdef"}])
    with pytest.raises(UsageError, match=r"rollout\.max_prompt_tokens=6 .* set rollout\.max_prompt_tokens=10"):
        open_rows(DataConfig(train=[path], max_tokens=6), "train", tokenizer, tmp_path, 0)
    with pytest.raises(DataError, match=r"b\.jsonl:1: prompts come from prompts, pairs, labelled answers"):
        open_rows(DataConfig(train=[write("b.jsonl", [{"text": "x"}])]), "train", tokenizer, tmp_path, 0)
