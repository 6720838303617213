"""What is hidden of packed rows, and what is to be predicted: rows of text in, rows of another objective out.

Each draw is a pure function of (seed, the row's place in the stream, its token or document), so that an epoch hides
other tokens than the one before and every layout and restart hides the same (law Order). Left out: which loss is taken,
for it is the same: the labels that count, over their number.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from framework.core import random
from framework.core.records import TokenBatch, Tokenizer
from framework.data.config import LanguageConfig, Objective

Places = npt.NDArray[np.int64]
Shape = Callable[[TokenBatch, Places], TokenBatch]  # (rows, their places [B] in the stream) -> rows


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


def shaped_by(config: LanguageConfig, objective: Objective, marks: Marks, seed: int) -> Shape:
    """What turns rows of next-token prediction into those of `objective`."""
    if objective is Objective.CAUSAL:
        return lambda rows, places: rows

    def draws(rows: TokenBatch, places: Places, number: Tensor | int) -> Tensor:
        """[B,T] in [0, 1): of a row's place in the stream, a number or document, and the token's own place."""
        stream, at = torch.from_numpy(places).unsqueeze(1), torch.arange(rows.tokens.shape[1])
        return random.uniform(random.key(seed, objective.value), stream, number, at)

    def shape(rows: TokenBatch, places: Places) -> TokenBatch:
        if objective is Objective.PREFIX:
            first = draws(rows, places, rows.document_ids)
            return with_random_prefixes(rows, first.gather(1, _firsts(rows)))
        if objective is Objective.MASKED:
            chosen, kind, other = (draws(rows, places, number) for number in range(3))
            return masked(rows, chosen, kind, other, config, marks)
        return without_spans(rows, draws(rows, places, 0), draws(rows, places, 1), config, marks)

    return shape


def masked(
    rows: TokenBatch, chosen: Tensor, kind: Tensor, other: Tensor, config: LanguageConfig, marks: Marks
) -> TokenBatch:
    """Masked language modelling (Devlin et al. 2018, section 3.1): a share of the tokens is predicted at its own place,
    most of them read as the mask token, some as any token, the rest as they are.

    chosen, kind, other [B,T]: uniform draws in [0, 1). The first token of a document is always read: it is the begin
    token where there is one.
    """
    open_ = (rows.document_ids > 0) & (rows.positions > 0)
    hidden = open_ & (chosen < config.share)
    as_mask = hidden & (kind < config.masked)
    as_any = hidden & ~as_mask & (kind < config.masked + config.random)
    assert marks.mask_id is not None
    read = torch.where(as_any, (other * marks.vocab_size).long(), rows.tokens).masked_fill(as_mask, marks.mask_id)
    return dataclasses.replace(rows, tokens=read, labels=rows.tokens, loss_mask=hidden)


def with_random_prefixes(rows: TokenBatch, draw: Tensor) -> TokenBatch:
    """Prefix language modelling (Raffel et al. 2020, section 3.2.3): of each document a first part of uniform length,
    at least one token, is seen whole and not predicted; what follows is, token after token.

    draw [B,T]: uniform in [0, 1), one number a document. Example, a document of 4 tokens and draw 0.5: 3 of them are
    its prefix; position 2 predicts what follows it, and so does position 3.
    """
    prefix = 1 + (draw * lengths(rows)).long()
    return _behind(rows, torch.where(rows.document_ids > 0, prefix, 0))


def with_prompts(rows: TokenBatch, places: Places | None = None) -> TokenBatch:
    """The prefix of each document is what stands before its first trained token: of a conversation, the prompt. What
    is trained stays as it is, and so does the answer of a model that reads no prefix."""
    untrained = torch.where(rows.loss_mask, rows.positions + 1, rows.tokens.shape[1])
    first = untrained.new_full((len(rows), int(rows.document_ids.max()) + 1), rows.tokens.shape[1])
    first = first.scatter_reduce(1, rows.document_ids, untrained, "amin").gather(1, rows.document_ids)
    return _behind(rows, torch.where(rows.document_ids > 0, first, 0))


def without_spans(
    rows: TokenBatch, of_hidden: Tensor, of_read: Tensor, config: LanguageConfig, marks: Marks
) -> TokenBatch:
    """Span corruption (Raffel et al. 2020, section 3.1.4): an encoder reads each document with spans hidden behind
    sentinels, a decoder writes the sentinels and what stood there. `source` is what is read.

    of_hidden, of_read [B,T]: uniform draws in [0, 1), by which hidden and read tokens are cut into spans, every way to
    cut them being as likely as any other. As in T5's own code a document begins with a span that is read and ends with
    one that is hidden, both texts end in the end token, and a document of one token is left out. Example, one document
    "thank you for inviting me to your party last week" in which "for inviting" and "week" are hidden:

        reads   thank you <extra_id_0> me to your party last <extra_id_1> </s>
        writes  <extra_id_0> for inviting <extra_id_1> week </s>
    """
    read, written = [], []
    for row, document_ids, hidden, shown in zip(rows.tokens, rows.document_ids, of_hidden, of_read, strict=True):
        texts = [
            _cut_up(row[mine], hidden[mine], shown[mine], config, marks)
            for number in range(1, int(document_ids.max()) + 1)
            if int((mine := document_ids == number).sum()) > 1
        ]
        read.append([torch.tensor(text) for text, _ in texts])
        written.append([torch.tensor(text) for _, text in texts])
    source = _together([[(text, None) for text in row] for row in read])
    starts = torch.tensor([marks.start_id])
    return dataclasses.replace(
        _together([[(torch.cat((starts, text[:-1])), text) for text in row] for row in written]), source=source
    )


def _cut_up(
    text: Tensor, of_hidden: Tensor, of_read: Tensor, config: LanguageConfig, marks: Marks
) -> tuple[list[int], list[int]]:
    """(what is read, what is written) of one document [n], n at least 2."""
    size = len(text)
    count = min(max(round(size * config.share), 1), size - 1)
    spans = min(max(round(count / config.span), 1), size - count, len(marks.sentinel_ids))
    lengths = zip(_composition(size - count, spans, of_read), _composition(count, spans, of_hidden), strict=True)
    read, written, at = list[int](), list[int](), 0
    for (kept, hidden), sentinel in zip(lengths, marks.sentinel_ids):
        read += [*text[at : at + kept].tolist(), sentinel]
        written += [sentinel, *text[at + kept : at + kept + hidden].tolist()]
        at += kept + hidden
    return [*read, marks.end_id], [*written, marks.end_id]


def _composition(total: int, parts: int, draw: Tensor) -> list[int]:
    """`total` as a sum of `parts` whole numbers of at least 1, each way as likely: cut where the draws are least."""
    cuts = draw[: total - 1].argsort(stable=True)[: parts - 1].sort().values + 1
    return torch.diff(torch.cat((torch.tensor([0]), cuts, torch.tensor([total])))).tolist()


def _together(rows: list[list[tuple[Tensor, Tensor | None]]]) -> TokenBatch:
    """Rows of documents (tokens, labels or None), padded on the right to one width, a multiple of 8."""
    width = -(-max([1, *(sum(len(text) for text, _ in row) for row in rows)]) // 8) * 8
    shape = (len(rows), width)
    tokens, labels, positions, documents = (torch.zeros(shape, dtype=torch.long) for _ in range(4))
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = 0
        for number, (text, label) in enumerate(row, start=1):
            place = (b, slice(at, at + len(text)))
            tokens[place], documents[place], positions[place] = text, number, torch.arange(len(text))
            if label is not None:
                labels[place], loss_mask[place] = label, True
            at += len(text)
    return TokenBatch(tokens, labels, loss_mask, positions, documents)


def _firsts(rows: TokenBatch) -> Tensor:
    """[B,T]: the place of the first token of each token's document."""
    return (torch.arange(rows.tokens.shape[1]) - rows.positions).clamp(min=0)


def lengths(rows: TokenBatch) -> Tensor:
    """[B,T]: how many tokens the document of each token has."""
    last = rows.positions.new_zeros(len(rows), int(rows.document_ids.max()) + 1)
    return last.scatter_reduce(1, rows.document_ids, rows.positions + 1, "amax").gather(1, rows.document_ids)


def _behind(rows: TokenBatch, prefix: Tensor) -> TokenBatch:
    """Only what follows a prefix is predicted: the place of its last token predicts the first."""
    return dataclasses.replace(rows, prefix_lengths=prefix, loss_mask=rows.loss_mask & (rows.positions + 1 >= prefix))
