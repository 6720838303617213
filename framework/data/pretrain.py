"""Rows to pretrain on: documents with an end token behind each, cut where longer than a row, packed where shorter."""

from functools import partial
from pathlib import Path

from framework.core.errors import DataError
from framework.core.records import ClassifiedSample, Sample, TextSample, Tokenizer
from framework.data.config import DataConfig
from framework.data.loader import RowSource
from framework.data.mixture import open_parts
from framework.data.prepare import Prepared, Progress, Skip
from framework.data.rows import TokenRows, open_shards, pack


def open_rows(
    config: DataConfig, part: str, tokenizer: Tokenizer, folder: Path, seed: int, progress: Progress | None = None
) -> RowSource:
    """The rows of "train" or "valid", prepared under `folder` (or data.cache) where they are not yet.

    The content does not depend on `seed`; only the loader's order does.
    """

    def open_one(config: DataConfig) -> TokenRows:
        render = partial(render_documents, tokenizer)
        finish = pack(config)
        shards = open_shards(config, part, tokenizer, folder, progress, kind="pretrain", render=render, finish=finish)
        return TokenRows(shards, tokenizer, config.max_tokens)

    return open_parts(config, part, open_one)


def render_documents(tokenizer: Tokenizer, samples: list[Sample]) -> list[Prepared | Skip]:
    """Ids of each text: bos where the tokenizer wants one, the text, the end token. Everything behind the first id is
    predicted."""
    texts = [_text(sample) for sample in samples]
    return [_document(tokenizer, text, ids) for text, ids in zip(texts, tokenizer.encode_many(texts))]


def _document(tokenizer: Tokenizer, text: str, ids: list[int]) -> Prepared | Skip:
    if not text.strip():
        return Skip("empty text")
    num_bytes = len(text.encode())
    whole = [*ids, tokenizer.end_id]
    if tokenizer.bos_id is None:
        num_bytes -= len(tokenizer.token_bytes(ids[0]))  # nothing stands in front of it, so it is not predicted
    else:
        whole.insert(0, tokenizer.bos_id)
    return Prepared((whole,), (), len(whole) - 1, num_bytes)


def _text(sample: Sample) -> str:
    if isinstance(sample, ClassifiedSample):
        return sample.text
    if not isinstance(sample, TextSample):
        raise DataError("pretraining takes plain texts (format text or lines); conversations are for sft")
    return sample.text
