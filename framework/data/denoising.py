"""What is hidden of packed rows, and what is to be predicted: rows of text in, rows of another objective out. `spans`
has those that are written elsewhere.

Each draw is a pure function of (seed, the row's place in the stream, its token or document), so that an epoch hides
other tokens than the one before and every layout and restart hides the same (law Order). Left out: which loss is taken,
for it is the same: the labels that count, over their number.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from framework.core import random
from framework.core.records import TokenBatch
from framework.data.config import LanguageConfig, Objective
from framework.data.spans import Marks, with_blanks, without_spans

Places = npt.NDArray[np.int64]
Shape = Callable[[TokenBatch, Places], TokenBatch]  # (rows, their places [B] in the stream) -> rows


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
        hide = without_spans if objective is Objective.SPANS else with_blanks
        return hide(rows, torch.stack([draws(rows, places, number) for number in range(3)]), config, marks)

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
    prefix = 1 + (draw * rows.lengths()).long()
    return _behind(rows, torch.where(rows.document_ids > 0, prefix, 0))


def with_prompts(rows: TokenBatch, places: Places | None = None) -> TokenBatch:
    """The prefix of each document is what stands before its first trained token: of a conversation, the prompt. What
    is trained stays as it is, and so does the answer of a model that reads no prefix."""
    untrained = torch.where(rows.loss_mask, rows.positions + 1, rows.tokens.shape[1])
    first = untrained.new_full((len(rows), int(rows.document_ids.max()) + 1), rows.tokens.shape[1])
    first = first.scatter_reduce(1, rows.document_ids, untrained, "amin").gather(1, rows.document_ids)
    return _behind(rows, torch.where(rows.document_ids > 0, first, 0))


def _firsts(rows: TokenBatch) -> Tensor:
    """[B,T]: the place of the first token of each token's document."""
    return (torch.arange(rows.tokens.shape[1]) - rows.positions).clamp(min=0)


def _behind(rows: TokenBatch, prefix: Tensor) -> TokenBatch:
    """Only what follows a prefix is predicted: the place of its last token predicts the first."""
    return dataclasses.replace(rows, prefix_lengths=prefix, loss_mask=rows.loss_mask & (rows.positions + 1 >= prefix))
