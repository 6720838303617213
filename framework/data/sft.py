"""Rows to fine-tune on: conversations by the tokenizer's chat template, the assistant's turns trained."""

from functools import partial
from pathlib import Path

from framework.core.errors import DataError
from framework.core.records import ConversationSample, LabelledSample, Message, Rendered, Sample, Tokenizer
from framework.data import chat_template
from framework.data.chat_template import UnstableTokens
from framework.data.config import DataConfig
from framework.data.loader import RowSource
from framework.data.mixture import open_parts
from framework.data.prepare import Prepared, Progress, Skip
from framework.data.rows import TokenRows, open_shards, pack
from framework.data.shards import OVER_LENGTH


def open_rows(
    config: DataConfig, part: str, tokenizer: Tokenizer, folder: Path, seed: int, progress: Progress | None = None
) -> RowSource:
    """The rows of "train" or "valid", prepared under `folder` (or data.cache) where they are not yet.

    The content does not depend on `seed`; only the loader's order does.
    """

    def open_one(config: DataConfig) -> TokenRows:
        render = partial(render_conversations, tokenizer, config.max_tokens)
        shards = open_shards(config, part, tokenizer, folder, progress, kind="sft", render=render, finish=pack(config))
        return TokenRows(shards, tokenizer, config.max_tokens)

    return open_parts(config, part, open_one)


def render_conversations(tokenizer: Tokenizer, max_tokens: int, samples: list[Sample]) -> list[Prepared | Skip]:
    """A conversation needs one position less than it has ids: the last id is only predicted, never read."""
    conversations = [_messages(sample) for sample in samples]
    kept = [messages for messages in conversations if not isinstance(messages, Skip)]
    rendered = iter(chat_template.render_conversations(tokenizer, kept))
    return [c if isinstance(c, Skip) else _prepared(max_tokens, c, next(rendered)) for c in conversations]


def _messages(sample: Sample) -> tuple[Message, ...] | Skip:
    if isinstance(sample, LabelledSample):
        if not sample.good:
            return Skip("labelled as a bad answer")
        sample = ConversationSample((*sample.prompt, Message("assistant", sample.answer)))
    if not isinstance(sample, ConversationSample):
        raise DataError("sft takes conversations (formats alpaca, sharegpt, messages, labelled)")
    said = any(answer.strip() for answer in _answers(sample.messages))
    return sample.messages if said else Skip("nothing to train: no assistant's turn with text")


def _answers(messages: tuple[Message, ...]) -> list[str]:
    return [message.content + message.tool_calls for message in messages if message.role == "assistant"]


def _prepared(max_tokens: int, messages: tuple[Message, ...], rendered: Rendered | UnstableTokens) -> Prepared | Skip:
    if isinstance(rendered, UnstableTokens):
        return Skip(str(rendered))
    if len(rendered.ids) - 1 > max_tokens:
        return Skip(OVER_LENGTH, len(rendered.ids) - 1)
    num_bytes = sum(len(answer.encode()) for answer in _answers(messages))
    return Prepared((rendered.ids,), (rendered.loss_mask,), sum(rendered.loss_mask[1:]), num_bytes)
