"""What is hidden of packed rows, and what is to be predicted: rows of text in, rows of another objective out.

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

Places = npt.NDArray[np.int64]
Shape = Callable[[TokenBatch, Places], TokenBatch]  # (rows, their places [B] in the stream) -> rows


def shaped_by(config: LanguageConfig, objective: Objective, mask_id: int | None, vocab_size: int, seed: int) -> Shape:
    """What turns rows of next-token prediction into those of `objective`. `mask_id` is asked for by `masked` alone."""

    def shape(rows: TokenBatch, places: Places) -> TokenBatch:
        stream = torch.from_numpy(places).unsqueeze(1)
        if objective is Objective.PREFIX:
            return with_random_prefixes(rows, random.uniform(random.key(seed, "prefix"), stream, rows.document_ids))
        if objective is Objective.MASKED:
            assert mask_id is not None
            at = torch.arange(rows.tokens.shape[1])
            draws = [random.uniform(random.key(seed, "masked"), stream, number, at) for number in range(3)]
            return masked(rows, draws[0], draws[1], draws[2], config, mask_id, vocab_size)
        return rows

    return shape


def masked(
    rows: TokenBatch, chosen: Tensor, kind: Tensor, other: Tensor, config: LanguageConfig, mask_id: int, vocab_size: int
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
    read = torch.where(as_any, (other * vocab_size).long(), rows.tokens).masked_fill(as_mask, mask_id)
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


def lengths(rows: TokenBatch) -> Tensor:
    """[B,T]: how many tokens the document of each token has."""
    last = rows.positions.new_zeros(len(rows), int(rows.document_ids.max()) + 1)
    return last.scatter_reduce(1, rows.document_ids, rows.positions + 1, "amax").gather(1, rows.document_ids)


def _behind(rows: TokenBatch, prefix: Tensor) -> TokenBatch:
    """Only what follows a prefix is predicted: the place of its last token predicts the first."""
    return dataclasses.replace(rows, prefix_lengths=prefix, loss_mask=rows.loss_mask & (rows.positions + 1 >= prefix))
