"""Spans that are hidden in a text and written elsewhere: by T5's decoder, or behind GLM's text.

Documents of packed rows are taken apart and put together anew, so a batch is as wide as its widest row. Left out: which
draws are taken (`denoising`).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, TypeVar

import torch
from torch import Tensor

from framework.core.records import TokenBatch, Tokenizer
from framework.data.config import LanguageConfig

D = TypeVar("D")


@dataclass(frozen=True)
class Marks:
    """What a tokenizer has to hide with. Example, T5: Marks(32100, 1, 0, sentinel_ids=(32099, 32098, ...))."""

    vocab_size: int
    end_id: int
    start_id: int
    mask_id: int | None = None
    sentinel_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Those of a tokenizer."""
        ids = tokenizer.end_id, tokenizer.start_id, tokenizer.mask_id, tokenizer.sentinel_ids
        return cls(tokenizer.vocab_size, *ids)


@dataclass
class _Document:
    """One document of a row in the making; a label of None is not predicted."""

    tokens: list[int] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    span_positions: list[int] = field(default_factory=list)
    prefix: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


def without_spans(rows: TokenBatch, draws: Tensor, config: LanguageConfig, marks: Marks) -> TokenBatch:
    """Span corruption (Raffel et al. 2020, section 3.1.4): an encoder reads each document with spans hidden behind
    sentinels, a decoder writes the sentinels and what stood there. `source` is what is read.

    draws [3,B,T]: uniform in [0, 1); by the first two, hidden and read tokens are cut into spans, every way to cut them
    being as likely as any other. As in T5's own code a document begins with a span that is read and ends with one that
    is hidden, both texts end in the end token, and a document of one token is left out. Example, one document "thank
    you for inviting me to your party last week" in which "for inviting" and "week" are hidden:

        reads   thank you <extra_id_0> me to your party last <extra_id_1> </s>
        writes  <extra_id_0> for inviting <extra_id_1> week </s>
    """
    pairs = _each(rows, draws, lambda text, draw: _behind_sentinels(text, draw, config, marks))
    source = _together([[read for read, _ in row] for row in pairs])
    return dataclasses.replace(_together([[written for _, written in row] for row in pairs]), source=source)


def _behind_sentinels(
    text: list[int], draws: Tensor, config: LanguageConfig, marks: Marks
) -> tuple[_Document, _Document]:
    """(what is read, what is written) of one document."""
    read, written, at = list[int](), list[int](), 0
    spans = _spans(len(text), draws, config, most=len(marks.sentinel_ids), ends_hidden=True)
    for (kept, hidden), sentinel in zip(spans, marks.sentinel_ids):
        read += [*text[at : at + kept], sentinel]
        written += [sentinel, *text[at + kept : at + kept + hidden]]
        at += kept + hidden
    read, written = [*read, marks.end_id], [*written, marks.end_id]
    inputs = [marks.start_id, *written[:-1]]
    return (
        _Document(read, [None] * len(read), list(range(len(read))), [0] * len(read)),
        _Document(inputs, [*written], list(range(len(inputs))), [0] * len(inputs)),
    )


def with_blanks(rows: TokenBatch, draws: Tensor, config: LanguageConfig, marks: Marks) -> TokenBatch:
    """Autoregressive blank infilling (Du et al. 2022, section 2.1): part A is the text with a mask token for each
    hidden span, seen whole; part B are the spans in a drawn order, each begun by the start token and predicted token by
    token up to the end token. `positions` are those of A, a span's all that of its mask; `span_positions` count in it.

    draws [3,B,T]: uniform in [0, 1); the third orders the spans. Example, "a b c d e f" with "c" and "e f" hidden, the
    second one first:

        tokens          a  b  M  d  M  S  e  f  S  c
        labels                         e  f  E  c  E
        positions       0  1  2  3  4  4  4  4  2  2
        span_positions  0  0  0  0  0  1  2  3  1  2        prefix_lengths 5
    """
    documents = _each(rows, draws, lambda text, draw: _blanked(text, draw, config, marks))
    return _together(documents)


def _blanked(text: list[int], draws: Tensor, config: LanguageConfig, marks: Marks) -> _Document:
    assert marks.mask_id is not None
    made, hidden_spans, at = _Document(), list[tuple[int, list[int]]](), 0
    spans = _spans(len(text), draws, config, most=len(text), ends_hidden=False)
    for kept, hidden in spans:
        made.tokens += [*text[at : at + kept], marks.mask_id]
        hidden_spans.append((len(made) - 1, text[at + kept : at + kept + hidden]))
        at += kept + hidden
    made.tokens += text[at:]
    made.prefix = len(made)
    made.positions += range(made.prefix)
    made.labels += [None] * made.prefix
    made.span_positions += [0] * made.prefix
    for number in draws[2][: len(hidden_spans)].argsort(stable=True).tolist():
        place, span = hidden_spans[number]
        made.tokens += [marks.start_id, *span]
        made.labels += [*span, marks.end_id]
        made.positions += [place] * (len(span) + 1)
        made.span_positions += range(1, len(span) + 2)
    return made


def _each(rows: TokenBatch, draws: Tensor, make: Callable[[list[int], Tensor], D]) -> list[list[D]]:
    """What `make` makes of each document of each row that has two tokens or more, and of its own draws [3,n]."""
    found = []
    for b, (tokens, ids) in enumerate(zip(rows.tokens, rows.document_ids, strict=True)):
        places = [(ids == number).nonzero().squeeze(1) for number in range(1, int(ids.max()) + 1)]
        found.append([make(tokens[at].tolist(), draws[:, b, at]) for at in places if len(at) > 1])
    return found


def _spans(size: int, draws: Tensor, config: LanguageConfig, most: int, ends_hidden: bool) -> list[tuple[int, int]]:
    """(tokens read, tokens hidden behind them), at most `most` times; not `ends_hidden`: some are read at the end."""
    count = min(max(round(size * config.share), 1), size - 1)
    spans = min(max(round(count / config.span), 1), size - count, most)
    hidden = _composition(count, spans, draws[0])
    read = _composition(size - count, spans, draws[1])
    if not ends_hidden:
        read = _composition(size - count + 1, spans + 1, draws[1])[:spans]
    return list(zip(read, hidden, strict=True))


def _composition(total: int, parts: int, draw: Tensor) -> list[int]:
    """`total` as a sum of `parts` whole numbers of at least 1, each way as likely: cut where the draws are least."""
    cuts = draw[: total - 1].argsort(stable=True)[: parts - 1].sort().values + 1
    return [int(n) for n in torch.diff(torch.cat((torch.tensor([0]), cuts, torch.tensor([total]))))]


def _together(rows: list[list[_Document]]) -> TokenBatch:
    """Documents in rows, padded on the right to one width, a multiple of 8."""
    width = -(-max([1, *(sum(map(len, row)) for row in rows)]) // 8) * 8
    tokens, labels, positions, ids, prefixes, spans = torch.zeros(6, len(rows), width, dtype=torch.long).unbind()
    loss_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = 0
        for number, made in enumerate(row, start=1):
            place = (b, slice(at, at + len(made)))
            tokens[place], positions[place] = torch.tensor(made.tokens), torch.tensor(made.positions)
            labels[place] = torch.tensor([label or 0 for label in made.labels])
            loss_mask[place] = torch.tensor([label is not None for label in made.labels])
            ids[place], prefixes[place], spans[place] = number, made.prefix, torch.tensor(made.span_positions)
            at += len(made)
    return TokenBatch(tokens, labels, loss_mask, positions, ids, prefix_lengths=prefixes, span_positions=spans)
