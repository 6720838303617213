"""Texts, or pairs of texts, with what they are, for classifiers and regressors: never packed, all of one width.

Left out: cutting a text that is too long (data.over_length refuses or skips it), and texts with several labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from framework.core.config import digest
from framework.core.errors import DataError, UsageError
from framework.core.records import ClassBatch, ClassifiedSample, Sample, TokenBatch, Tokenizer
from framework.data.config import ClassifyConfig, DataConfig
from framework.data.loader import RowSource
from framework.data.mixture import open_parts
from framework.data.prepare import Prepared, Progress, Skip
from framework.data.preview import marked
from framework.data.rows import PreparedRows, open_shards
from framework.data.shards import OVER_LENGTH, Array, Shards
from framework.data.sources import Located, open_sources, read_located

Label = str | int | float
_PAUSE_EVERY = 256  # samples


@dataclass(frozen=True)
class Targets:
    """What labels mean. Example: Targets(("neg", "pos")): a label is the number of its word; Targets(()): itself."""

    words: tuple[str, ...]  # of the classes in their order; () = numbers to predict

    @property
    def size(self) -> int:
        """Outputs of a model's head."""
        return len(self.words) or 1

    def number(self, label: Label) -> float:
        """What a model is to give for a label; DataError for one that it cannot."""
        if not self.words:
            if isinstance(label, str):
                raise DataError(f"label {label!r} is a word where numbers are to be predicted")
            return float(label)
        if str(label) not in self.words:
            raise DataError(f"label {str(label)!r} is none that data.train has: {_listed(self.words)}")
        return float(self.words.index(str(label)))

    def shown(self, number: float) -> str:
        """A label as the data have it."""
        return self.words[int(number)] if self.words else f"{number:g}"

    def told(self) -> str:
        """A line for a person."""
        return f"{len(self.words)} classes: {_listed(self.words)}" if self.words else "labels are numbers: regression"


def read_targets(data: DataConfig, config: ClassifyConfig, pause: Callable[[], None] = lambda: None) -> Targets:
    """What the labels of data.train mean, a share held out of it included; every label is looked at. `pause` is called
    now and then while reading."""
    first: dict[tuple[type, Label], Located] = {}  # 1 and 1.0 are equal, and another thing
    for number, located in enumerate(read_located(open_sources(data.train, data.format))):
        label = _checked(located.sample, located).label
        first.setdefault((type(label), label), located)
        if number % _PAUSE_EVERY == 0:
            pause()
    fractions, words = _of(first, float), _of(first, str)
    if config.regression or (config.regression is None and fractions and not config.labels):
        _refuse(words, "is a word, where others are fractions or classify.regression=true wants numbers")
        return Targets(())
    _refuse(fractions, "is a fraction and no class; write classes as words or whole numbers, or predict numbers by "
            "classify.regression=true")  # fmt: skip
    found = sorted({str(label) for _, label in first}, key=str if words else int)
    if len(found) < 2:
        raise UsageError(f"data.train has one label alone, {found[0]!r}; a classifier needs at least two to tell apart")
    strange = [(label, place) for (_, label), place in first.items() if str(label) not in (config.labels or found)]
    _refuse(strange, f"is not in classify.labels: {_listed(config.labels)}")
    return Targets(tuple(config.labels or found))


def open_rows(
    targets: Targets,
    token_types: int,
    config: DataConfig,
    part: str,
    tokenizer: Tokenizer,
    folder: Path,
    seed: int,
    progress: Progress | None = None,
) -> RowSource:
    """The texts of "train" or "valid", prepared under `folder` (or data.cache) where they are not yet.

    `token_types`: how many parts of a pair the model tells apart; 0 = it is not told. The content does not depend on
    `seed`; only the loader's order does.
    """

    def open_one(config: DataConfig) -> ClassRows:
        render = partial(render_texts, tokenizer, config.max_tokens, targets)
        kind = f"classify {digest(targets.words)}"
        shards = open_shards(config, part, tokenizer, folder, progress, kind=kind, render=render)
        return ClassRows(shards, tokenizer, config.max_tokens, targets, token_types > 1)

    return open_parts(config, part, open_one)


class ClassRows(PreparedRows):
    """Row r is text (or pair) r."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer, max_tokens: int, targets: Targets, has_types: bool):
        super().__init__(shards, tokenizer, max_tokens)
        self.targets, self._has_types = targets, has_types

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def labels(self) -> Array:
        """[N] float64, of all rows: see `Targets.number`."""
        return np.array(self.shards.array("label"))

    def rows(self, index: Array) -> ClassBatch:
        """[B, max_tokens] for row numbers [B] int64. No token is predicted."""
        shape = (len(index), self.max_tokens)
        tokens, documents, types = (np.zeros(shape, np.int64) for _ in range(3))
        for b, number in enumerate(index.tolist()):
            ids, second = self.shards.sequence(number)
            tokens[b, : len(ids)], documents[b, : len(ids)], types[b, : len(ids)] = ids, 1, second
        nothing, positions = np.zeros(shape, np.int64), np.arange(self.max_tokens) * documents
        read = torch.from_numpy
        batch = TokenBatch(
            tokens=read(tokens),
            labels=read(nothing),
            loss_mask=read(np.zeros(shape, bool)),
            positions=read(positions),
            document_ids=read(documents),
            token_types=read(types) if self._has_types else None,
        )
        label = self.shards.array("label")[index].astype(np.int64 if self.targets.words else np.float32)
        return ClassBatch(batch, read(label))

    def preview(self) -> str:
        """The first text with its label."""
        ids, _ = self.shards.sequence(0)
        label = self.targets.shown(float(self.shards.array("label")[0]))
        return f"{marked(self.tokenizer, ids, np.zeros(len(ids), bool))}\n  is labelled {label}"


def render_texts(
    tokenizer: Tokenizer, max_tokens: int, targets: Targets, samples: list[Sample]
) -> list[Prepared | Skip]:
    """Begin token where the tokenizer has one, text, end token; of a pair the second text and another end token behind
    it: as BERT reads [CLS] text [SEP] pair [SEP]."""
    classified = [_checked(sample) for sample in samples]
    parts = [[text for text in (sample.text, sample.pair) if text is not None] for sample in classified]
    ids = iter(tokenizer.encode_many([text for texts in parts for text in texts]))
    encoded = [[next(ids) for _ in texts] for texts in parts]
    return [_prepared(tokenizer, max_tokens, targets, *row) for row in zip(classified, parts, encoded)]


def _prepared(
    tokenizer: Tokenizer,
    max_tokens: int,
    targets: Targets,
    sample: ClassifiedSample,
    texts: Sequence[str],
    encoded: Sequence[list[int]],
) -> Prepared | Skip:
    label = targets.number(sample.label)
    if not all(text.strip() for text in texts):
        return Skip("empty text")
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    first, *second = ([*ids, tokenizer.end_id] for ids in encoded)
    ids = [*begin, *first, *(second[0] if second else [])]
    if len(ids) > max_tokens:
        return Skip(OVER_LENGTH, len(ids))
    mask = [number >= len(begin) + len(first) for number in range(len(ids))]
    return Prepared((ids,), (mask,), len(ids), sum(len(text.encode()) for text in texts), label=label)


def _checked(sample: Sample, place: Located | None = None) -> ClassifiedSample:
    if isinstance(sample, ClassifiedSample):
        return sample
    where = () if place is None else (place.path, place.line)
    raise DataError("classify takes texts with a label (format classified: text, label)", *where)


def _of(first: Mapping[tuple[type, Label], Located], wanted: type) -> list[tuple[Label, Located]]:
    return [(label, place) for (kind, label), place in first.items() if kind is wanted]


def _refuse(labels: Sequence[tuple[Label, Located]], why: str) -> None:
    if labels:
        label, place = labels[0]
        raise DataError(f"label {label!r} {why}", place.path, place.line)


def _listed(words: Sequence[str], most: int = 10) -> str:
    return ", ".join(words[:most]) + (f", and {len(words) - most} more" if len(words) > most else "")
