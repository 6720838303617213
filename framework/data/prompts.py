"""Prompts to answer, for reinforcement learning: up to where the assistant begins, padded on the right."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from framework.core.errors import DataError
from framework.core.records import (
    ConversationSample,
    LabelledSample,
    Message,
    PreferenceSample,
    PromptBatch,
    PromptSample,
    Sample,
    Tokenizer,
)
from framework.data.chat_template import render_prompt
from framework.data.config import DataConfig
from framework.data.loader import RowSource
from framework.data.mixture import open_parts
from framework.data.prepare import Prepared, Progress, Skip
from framework.data.preview import marked
from framework.data.rows import PreparedRows, open_shards
from framework.data.shards import OVER_LENGTH, Array


def open_rows(
    config: DataConfig, part: str, tokenizer: Tokenizer, folder: Path, seed: int, progress: Progress | None = None
) -> RowSource:
    """The prompts of "train" or "valid", at most and padded to config.max_tokens (the recipe's
    rollout.max_prompt_tokens), prepared under `folder`.

    The content does not depend on `seed`; only the loader's order does.
    """

    def open_one(config: DataConfig) -> PromptRows:
        render = partial(render_prompts, tokenizer, config.max_tokens)
        limit = "rollout.max_prompt_tokens"
        shards = open_shards(config, part, tokenizer, folder, progress, kind="prompts", render=render, limit=limit)
        return PromptRows(shards, tokenizer, config.max_tokens)

    return open_parts(config, part, open_one)


class PromptRows(PreparedRows):
    """Row r is prompt r."""

    def __len__(self) -> int:
        return len(self.shards)

    def rows(self, index: Array) -> PromptBatch:
        """[B, max_tokens] for prompt numbers [B] int64; the loader sets `row` to positions of its stream."""
        tokens = np.zeros((len(index), self.max_tokens), np.int64)
        mask = np.zeros(tokens.shape, bool)
        for b, number in enumerate(index.tolist()):
            ids, _ = self.shards.sequence(number)
            tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True
        return PromptBatch(torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(index.astype(np.int64)))

    def preview(self) -> str:
        """The first prompt; nothing in it is trained."""
        ids, _ = self.shards.sequence(0)
        return marked(self.tokenizer, ids, np.zeros(len(ids), bool))


def render_prompts(tokenizer: Tokenizer, max_tokens: int, samples: list[Sample]) -> list[Prepared | Skip]:
    """Ids of each prompt, the template's generation prompt included."""
    return [_prompt(tokenizer, max_tokens, _asked(sample)) for sample in samples]


def _prompt(tokenizer: Tokenizer, max_tokens: int, messages: tuple[Message, ...]) -> Prepared | Skip:
    if not any(message.content.strip() for message in messages):
        return Skip("empty prompt")
    ids = render_prompt(tokenizer, messages)
    if len(ids) > max_tokens:
        return Skip(OVER_LENGTH, len(ids))
    return Prepared((ids,), (), len(ids), sum(len(message.content.encode()) for message in messages))


def _asked(sample: Sample) -> tuple[Message, ...]:
    """What is to be answered: conversations and pairs lend their prompts too."""
    if isinstance(sample, PromptSample | PreferenceSample | LabelledSample):
        return sample.prompt
    if isinstance(sample, ConversationSample):
        last = max((n for n, m in enumerate(sample.messages) if m.role == "assistant"), default=len(sample.messages))
        return sample.messages[:last]
    raise DataError("prompts come from prompts, pairs, labelled answers and conversations, not from text")
