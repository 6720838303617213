"""Rows behind the loader: opening what is prepared, refusing what the recipe refuses, and rows of packed tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from framework.core.errors import DataError, UsageError
from framework.core.records import Sample, TokenBatch, Tokenizer
from framework.data import packing
from framework.data.config import DataConfig
from framework.data.packing import Plan
from framework.data.prepare import Preparation, Prepared, Progress, Skip, prepare
from framework.data.preview import marked
from framework.data.shards import OVER_LENGTH, Array, Shards

Render = Callable[[list[Sample]], list[Prepared | Skip]]
Finish = Callable[[Array], dict[str, Array]]


def open_shards(
    config: DataConfig,
    part: str,
    tokenizer: Tokenizer,
    folder: Path,
    progress: Progress | None,
    *,
    kind: str,
    render: Render,
    finish: Finish = lambda ends: {},
    limit: str = "data.max_tokens",
) -> Shards:
    """The shards of one part of the data, made where they are not there yet.

    DataError where nothing is left to use, UsageError where samples are over length and the recipe says "refuse";
    `limit` is the key by which the recipe sets config.max_tokens.
    """
    if part == "valid" and not config.valid:
        raise UsageError("there is no validation data: set data.valid to files, or to a share of data.train (0.02)")
    paths = config.valid_paths if part == "valid" and config.valid_paths else config.train
    preparation = Preparation(
        kind=kind,
        paths=paths,
        format=config.format,
        part=part,
        valid_share=config.valid_share,
        max_tokens=config.max_tokens,
        packing=config.packing,
        tokenizer=tokenizer,
        render=render,
        finish=finish,
    )
    shards = prepare(preparation, Path(config.cache) if config.cache else folder, progress)
    _refuse_over_length(shards, config, part, limit)
    _refuse_nothing(shards, config, part, paths)
    return shards


class PreparedRows:
    """What all rows know of their preparation."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer, max_tokens: int):
        self.shards, self.tokenizer, self.max_tokens = shards, tokenizer, max_tokens

    @property
    def fingerprint(self) -> str:
        """Of all that decides the rows' content."""
        return self.shards.folder.name

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples were left out, by reason."""
        return dict(self.shards.counted.skipped)

    @property
    def num_tokens(self) -> int:
        """Labels that count, over all rows."""
        return self.shards.counted.num_tokens

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text that those labels stand for."""
        return self.shards.counted.num_bytes


class TokenRows(PreparedRows):
    """Rows of max_tokens positions that hold one or more documents each, by the plan beside the shards."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer, max_tokens: int):
        super().__init__(shards, tokenizer, max_tokens)
        self._plan = Plan(shards.array("row_offsets"), shards.array("row_items"))

    def __len__(self) -> int:
        return len(self._plan.offsets) - 1

    @property
    def efficiency(self) -> float:
        """The share of positions that hold a token."""
        return (self.shards.counted.num_ids - len(self.shards)) / (len(self) * self.max_tokens)

    def rows(self, index: Array) -> TokenBatch:
        """[B, max_tokens] for row numbers [B] int64."""
        return packing.assemble(self._plan, index, self.max_tokens, self._piece)

    def preview(self) -> str:
        """The first document of the data, or its first piece, as it is trained."""
        ids, mask = self._piece(0)
        mask[0] = False  # the first id is read and never predicted
        return marked(self.tokenizer, ids, mask)

    def _piece(self, number: int) -> tuple[Array, Array]:
        """A piece's ids and mask, with the one id more that its last position predicts."""
        ends, text = self.shards.array("ends"), int(self.shards.array("piece_text")[number])
        start = int(self.shards.array("piece_start")[number]) + (int(ends[text - 1]) if text else 0)
        return self.shards.span(start, min(start + self.max_tokens + 1, int(ends[text])))


def pack(config: DataConfig) -> Finish:
    """What turns the ends of all sequences into pieces of at most max_tokens positions, and those into rows."""

    def finish(ends: Array) -> dict[str, Array]:
        positions = np.diff(ends, prepend=0) - 1
        texts, starts = packing.cut(positions, config.max_tokens)
        lengths = np.minimum(positions[texts] - starts, config.max_tokens)
        plan = packing.best_fit(lengths, config.max_tokens) if config.packing else packing.one_each(len(lengths))
        return {"piece_text": texts, "piece_start": starts, "row_offsets": plan.offsets, "row_items": plan.items}

    return finish


def _refuse_over_length(shards: Shards, config: DataConfig, part: str, limit: str) -> None:
    counted = shards.counted
    over = counted.skipped.get(OVER_LENGTH, 0)
    if over and config.over_length == "refuse":
        raise UsageError(
            f"{over} of {counted.read} samples of data.{part} are over {limit}={config.max_tokens} (the first at "
            f"{counted.first_over}); set {limit}={counted.longest} to take all, or data.over_length=skip"
        )


def _refuse_nothing(shards: Shards, config: DataConfig, part: str, paths: list[str]) -> None:
    if len(shards):
        return
    reasons = "".join(f", {reason}: {count}" for reason, count in shards.counted.skipped.items())
    share = f", data.valid={config.valid_share}" if config.valid_share else ""
    what = f"no sample left for data.{part}: {shards.counted.read} read{share}{reasons}"
    raise DataError(what, ", ".join(paths))
