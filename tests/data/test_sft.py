"""Rows of conversations: answers trained and nothing else, over length refused with figures or skipped and counted."""

from pathlib import Path

import numpy as np
import pytest

from framework.core.errors import DataError, UsageError
from framework.core.records import Tokenizer
from framework.data.config import DataConfig
from framework.data.sft import open_rows
from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.load import load
from framework.tokenization.train import train
from tests.data.conftest import Write

RECORDS = [
    {"instruction": "hi", "output": "yo"},  # <|end|><|user|>hi<|end|><|assistant|>yo<|end|>: 9 ids, 8 positions
    {"instruction": "a", "output": "bcé", "system": "s"},  # 13 ids: é is two bytes
    {"instruction": "q", "output": " "},
]


def test_by_hand(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    config = DataConfig(train=[write("a.jsonl", RECORDS)], max_tokens=20)
    rows = open_rows(config, "train", tokenizer, tmp_path, 0)
    batch = rows.rows(np.array([0]))
    h, i, y, o = (261 + ord(c) - ord("a") for c in "hiyo")
    assert batch.tokens[0, :8].tolist() == [1, 2, h, i, 1, 3, y, o]
    assert batch.labels[0, :8].tolist() == [2, h, i, 1, 3, y, o, 1]
    assert batch.loss_mask[0, :8].int().tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert batch.document_ids[0].tolist() == [1] * 8 + [2] * 12
    assert int(batch.loss_mask.sum()) == rows.num_tokens == 3 + 5
    assert rows.num_bytes == 2 + 4
    assert rows.skipped == {"nothing to train: no assistant's turn with text": 1}
    assert rows.preview() == "<|end|><|user|>hi<|end|><|assistant|>«yo<|end|>»"


def test_without_packing_each_has_a_row(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    config = DataConfig(train=[write("a.jsonl", RECORDS)], max_tokens=20, packing=False)
    rows = open_rows(config, "train", tokenizer, tmp_path, 0)
    assert len(rows) == 2
    assert rows.rows(np.array([1])).document_ids[0].tolist() == [1] * 12 + [0] * 8


def test_over_length_is_refused_with_figures_that_work(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", RECORDS)
    message = (
        r"1 of 3 samples of data\.train are over data\.max_tokens=8 \(the first at .*a\.jsonl:2\); "
        r"set data\.max_tokens=12 to take all, or data\.over_length=skip"
    )
    for _ in range(2):  # found prepared, it is refused all the same
        with pytest.raises(UsageError, match=message):
            open_rows(DataConfig(train=[path], max_tokens=8), "train", tokenizer, tmp_path, 0)
    assert len(open_rows(DataConfig(train=[path], max_tokens=12), "train", tokenizer, tmp_path, 0)) == 2
    rows = open_rows(DataConfig(train=[path], max_tokens=8, over_length="skip"), "train", tokenizer, tmp_path, 0)
    assert rows.skipped["over length"] == 1
    assert len(rows) == 1


def test_other_samples_and_refusing_templates_are_named(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: sft takes conversations"):
        open_rows(DataConfig(train=[write("a.jsonl", [{"text": "x"}])]), "train", tokenizer, tmp_path, 0)
    turns = [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]
    fine = {"messages": [{"role": "user", "content": "x"}, turns[1]]}
    path = write("b.jsonl", [fine, {"messages": turns}])
    with pytest.raises(DataError, match=r"b\.jsonl:2: the chat template refuses this conversation: no role 'tool'"):
        open_rows(DataConfig(train=[path]), "train", tokenizer, tmp_path, 0)


def test_of_labelled_answers_the_good_ones_are_imitated(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    answers = [{"prompt": "hi", "completion": text, "label": text == "yo"} for text in ("yo", "no")]
    rows = open_rows(DataConfig(train=[write("a.jsonl", answers)], max_tokens=20), "train", tokenizer, tmp_path, 0)
    assert rows.preview() == "<|end|><|user|>hi<|end|><|assistant|>«yo<|end|>»"
    assert rows.skipped == {"labelled as a bad answer": 1}


def test_a_call_of_a_tool_is_trained_and_its_result_is_not(write: Write, tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ tools | map(attribute='function.name') | join(',') }}{% endif %}{% for m in messages %}"
        "{{ '<|' + m.role + '|>' + m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
        "{% endfor %}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    learned = train(iter(["abc"]), TokenizerConfig(kind=TokenizerKind.CHARACTER, vocab_size=270))
    learned.save(str(tmp_path / "tokenizer"))
    (tmp_path / "tokenizer/chat_template.jinja").write_text(template)
    turns = [("human", "q"), ("function_call", '{"name": "f"}'), ("observation", "2"), ("gpt", "a")]
    record = {"conversations": [{"from": who, "value": said} for who, said in turns], "tools": '[{"name": "f"}]'}
    config = DataConfig(train=[write("a.jsonl", [record])], max_tokens=64)
    rows = open_rows(config, "train", load(tmp_path / "tokenizer"), tmp_path, 0)
    assert rows.preview() == ("f<|user|>q<|end|><|assistant|>«f<|end|>»<|tool|>2<|end|><|assistant|>«a<|end|>»")
