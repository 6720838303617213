"""Pairs of answers to one prompt, for reward models and preference learning: never packed, all of one width."""

import copy
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from framework.core.errors import DataError
from framework.core.records import PreferenceBatch, PreferenceSample, Rendered, Sample, TokenBatch, Tokenizer
from framework.data.chat_template import UnstableTokens, render_answers
from framework.data.config import DataConfig
from framework.data.denoising import with_prompts
from framework.data.loader import RowSource
from framework.data.mixture import Mixture, open_parts
from framework.data.prepare import Prepared, Progress, Skip
from framework.data.preview import marked
from framework.data.rows import PreparedRows, open_shards
from framework.data.shards import OVER_LENGTH, Array, Shards


def open_rows(
    config: DataConfig, part: str, tokenizer: Tokenizer, folder: Path, seed: int, progress: Progress | None = None
) -> RowSource:
    """The pairs of "train" or "valid", prepared under `folder` (or data.cache) where they are not yet.

    The content does not depend on `seed`; only the loader's order does.
    """

    def open_one(config: DataConfig) -> PairRows:
        render = partial(render_pairs, tokenizer, config.max_tokens)
        shards = open_shards(config, part, tokenizer, folder, progress, kind="preference", render=render)
        return PairRows(shards, tokenizer, config.max_tokens)

    return open_parts(config, part, open_one)


def with_reference(rows: RowSource, table: Tensor) -> RowSource:
    """`rows` of `open_rows` whose row r carries table[r], of [N, 2]: a reference's log-probs of both answers."""
    if isinstance(rows, Mixture):
        parts = table.split([len(source) for source in rows.sources])
        return rows.over([with_reference(source, part) for source, part in zip(rows.sources, parts, strict=True)])
    assert isinstance(rows, PairRows)
    return rows.with_reference(table)


class PairRows(PreparedRows):
    """Row r is pair r: sequence 2r chosen, 2r + 1 rejected. `margin` where any pair of the data has one, else None."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer, max_tokens: int):
        super().__init__(shards, tokenizer, max_tokens)
        margins = np.array(shards.array("margin"))
        self._reference: Tensor | None = None
        self._margins = None if np.isnan(margins).all() else np.nan_to_num(margins).astype(np.float32)

    def __len__(self) -> int:
        return len(self.shards) // 2

    def rows(self, index: Array) -> PreferenceBatch:
        """Both sides [B, max_tokens] for pair numbers [B] int64."""
        margin = None if self._margins is None else torch.from_numpy(self._margins[index])
        reference = None if self._reference is None else self._reference[torch.from_numpy(index)]
        return PreferenceBatch(self._side(2 * index), self._side(2 * index + 1), margin, reference)

    def with_reference(self, table: Tensor) -> Self:
        """The same pairs, pair r with table[r]: see `PreferenceBatch.reference`."""
        other = copy.copy(self)
        other._reference = table
        return other

    def preview(self) -> str:
        """The first pair."""
        chosen, rejected = (marked(self.tokenizer, *self.shards.sequence(n)) for n in (0, 1))
        return f"{chosen}\n  is preferred to\n{rejected}"

    def _side(self, numbers: Array) -> TokenBatch:
        """[B, max_tokens], the prompt their prefix. Unlike in packed rows the end token is read too: a reward is read
        off its hidden state."""
        shape = (len(numbers), self.max_tokens)
        tokens, labels, documents = (np.zeros(shape, np.int64) for _ in range(3))
        loss_mask = np.zeros(shape, bool)
        for b, number in enumerate(numbers.tolist()):
            ids, mask = self.shards.sequence(number)
            size = len(ids)
            tokens[b, :size], documents[b, :size] = ids, 1
            labels[b, : size - 1], loss_mask[b, : size - 1] = ids[1:], mask[1:]
        positions = np.arange(self.max_tokens) * documents
        read = torch.from_numpy
        return with_prompts(TokenBatch(read(tokens), read(labels), read(loss_mask), read(positions), read(documents)))


def render_pairs(tokenizer: Tokenizer, max_tokens: int, samples: list[Sample]) -> list[Prepared | Skip]:
    """Both answers behind their prompt, each ended by the end token; only the answers are trained."""
    pairs = [_checked(sample) for sample in samples]
    rendered = render_answers(tokenizer, [(p.prompt, answer) for p in pairs for answer in _answers(p)])
    sides = iter(rendered)
    return [_pair(max_tokens, p, [next(sides) for _ in _answers(p)]) for p in pairs]


def _checked(sample: Sample) -> PreferenceSample:
    if not isinstance(sample, PreferenceSample):
        raise DataError("this stage takes pairs (formats preference, hh, medicalgpt)")
    return sample


def _answers(sample: PreferenceSample) -> tuple[str, ...]:
    """Both, or none where they are equal."""
    return () if sample.chosen == sample.rejected else (sample.chosen, sample.rejected)


def _pair(max_tokens: int, sample: PreferenceSample, rendered: list[Rendered | UnstableTokens]) -> Prepared | Skip:
    if not rendered:
        return Skip("chosen and rejected are equal")
    sides = [side for side in rendered if isinstance(side, Rendered)]
    if len(sides) < len(rendered):
        return Skip(next(str(side) for side in rendered if isinstance(side, UnstableTokens)))
    longest = max(len(side.ids) for side in sides)
    if longest > max_tokens:
        return Skip(OVER_LENGTH, longest)
    return Prepared(
        sequences=tuple(side.ids for side in sides),
        masks=tuple(side.loss_mask for side in sides),
        num_tokens=sum(sum(side.loss_mask) for side in sides),
        num_bytes=sum(len(answer.encode()) for answer in _answers(sample)),
        margin=sample.margin,
    )
