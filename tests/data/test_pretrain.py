"""Rows of documents: every token of every document exactly once, no label across a boundary, counts by hand."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.core.errors import DataError, UsageError
from framework.core.records import TokenBatch, Tokenizer
from framework.data.config import DataConfig
from framework.data.loader import Loader
from framework.data.mixture import Mixture
from framework.data.pretrain import open_rows
from tests.data.conftest import Write

END = 1


@dataclass
class WithoutStart:
    """A tokenizer that wants nothing in front of a document."""

    inner: Tokenizer
    bos_id: None = None
    fingerprint: str = "without start"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def segments(batch: TokenBatch) -> Iterator[tuple[int, ...]]:
    """The documents of rows, each with its last label; checks what must hold of every one on the way."""
    for b in range(len(batch)):
        ids = batch.document_ids[b]
        assert ids[ids > 0].tolist() == sorted(ids[ids > 0].tolist())
        assert not batch.loss_mask[b][ids == 0].any()
        assert not batch.tokens[b][ids == 0].any()
        assert not batch.labels[b][ids == 0].any()
        for document in range(1, int(ids.max()) + 1):
            place = ids == document
            tokens, labels = batch.tokens[b][place].tolist(), batch.labels[b][place].tolist()
            assert tokens[1:] == labels[:-1], "a label is the next token of its own document"
            assert batch.positions[b][place].tolist() == list(range(len(tokens)))
            assert batch.loss_mask[b][place].all()
            yield (*tokens, labels[-1])


def pieces(ids: list[int], size: int) -> list[tuple[int, ...]]:
    """Consecutive pieces of `size` positions that share their border token: read by one, predicted by the other."""
    return [tuple(ids[start : start + size + 1]) for start in range(0, len(ids) - 1, size)]


@pytest.mark.parametrize("start", [True, False])
def test_every_token_of_every_document_exactly_once(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, start: bool
) -> None:
    wanted: Any = tokenizer if start else WithoutStart(tokenizer)
    folder = tmp_path_factory.mktemp("rows")
    documents = st.lists(st.text("abc é", min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=20)

    @settings(max_examples=60, deadline=None)
    @given(documents, st.integers(2, 20), st.booleans(), st.integers(1, 7))
    def check(texts: list[str], size: int, packing: bool, batch_size: int) -> None:
        (folder / "a.txt").write_text("\n".join(texts))
        config = DataConfig(train=[str(folder / "a.txt")], format="lines", max_tokens=size, packing=packing)
        rows = open_rows(config, "train", wanted, folder / "cache", 0)
        batches = list(Loader(rows, batch_size, 0).evaluation_batches())
        found = Counter(segment for batch in batches for segment in segments(batch))
        whole = [[END] * start + tokenizer.encode(text) + [END] for text in texts]
        assert found == Counter(piece for ids in whole for piece in pieces(ids, size))
        assert rows.num_tokens == sum(int(batch.loss_mask.sum()) for batch in batches)
        assert all(batch.tokens.shape[1] == size for batch in batches)

    check()


def test_by_hand(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    """a = 261. "abcde" has seven ids with its start and its end: six positions, cut after four."""
    config = DataConfig(train=[write("a.txt", ["abcde", "z"])], max_tokens=4)
    rows = open_rows(config, "train", tokenizer, tmp_path / "cache", 0)
    batch = rows.rows(np.array([0, 1]))
    assert batch.tokens.tolist() == [[1, 261, 262, 263], [264, 265, 1, 286]]
    assert batch.labels.tolist() == [[261, 262, 263, 264], [265, 1, 286, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 1], [1, 1, 2, 2]]
    assert (len(rows), rows.num_tokens, rows.num_bytes, rows.efficiency) == (2, 8, 6, 1.0)
    assert rows.preview() == "<|end|>«abcd»"


def test_bytes_are_those_that_are_predicted(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    """Without a start token nobody predicts the first token: é is two tokens of one byte each."""
    config = DataConfig(train=[write("a.txt", ["é", "ab"])], max_tokens=8)
    plain: Any = WithoutStart(tokenizer)
    assert open_rows(config, "train", tokenizer, tmp_path, 0).num_bytes == 4
    assert open_rows(config, "train", plain, tmp_path, 0).num_bytes == 2


def test_empty_texts_are_counted(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", [{"text": "a"}, {"text": " \n"}, {"text": ""}])
    rows = open_rows(DataConfig(train=[path], max_tokens=8), "train", tokenizer, tmp_path, 0)
    assert (len(rows), rows.skipped) == (1, {"empty text": 2})
    with pytest.raises(DataError, match=r"b\.jsonl: no sample left for data\.train: 1 read, empty text: 1"):
        open_rows(DataConfig(train=[write("b.jsonl", [{"text": ""}])]), "train", tokenizer, tmp_path, 0)


def test_parts_and_what_is_missing(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    train, valid = write("a.txt", ["a", "b"]), write("b.txt", ["c"])
    config = DataConfig(train=[train], valid=[valid], max_tokens=8)
    assert [open_rows(config, part, tokenizer, tmp_path, 0).num_tokens for part in ("train", "valid")] == [4, 2]
    with pytest.raises(UsageError, match=r"no validation data: set data\.valid to files"):
        open_rows(DataConfig(train=[train]), "valid", tokenizer, tmp_path, 0)
    with pytest.raises(DataError, match=r"no sample left for data\.valid: 0 read, data\.valid=1e-09"):
        open_rows(DataConfig(train=[train], valid=["1e-9"]), "valid", tokenizer, tmp_path, 0)
    with pytest.raises(DataError, match=r"c\.jsonl:1: pretraining takes plain texts"):
        open_rows(DataConfig(train=[write("c.jsonl", [{"prompt": "p"}])]), "train", tokenizer, tmp_path, 0)


def test_the_cache_of_the_recipe_wins(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    config = DataConfig(train=[write("a.txt", ["a"])], cache=str(tmp_path / "mine"))
    open_rows(config, "train", tokenizer, tmp_path / "beside", 0)
    assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / "beside").exists()


def test_weights_mix_files(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    config = DataConfig(
        train=[write("a.txt", ["a"] * 6), write("b.txt", ["b"] * 6)], weights=[3, 1], max_tokens=2, packing=False
    )
    rows = open_rows(config, "train", tokenizer, tmp_path, 0)
    assert isinstance(rows, Mixture)
    drawn = Loader(rows, 8, 0).batch(0).tokens[:, 1].tolist()
    assert sorted(drawn) == [261] * 6 + [262] * 2
