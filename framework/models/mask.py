"""Which tokens a token sees: the one place where attention masks are made.

A query sees keys of its own document: of a decoder those up to its own place, and through a window the last `window` of
them; of a prefix also the document's first part; of an encoder all. Of what an encoder has read, its own document's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cuda_ext.attention.documents import Documents


@dataclass(frozen=True)
class View:
    """What the queries of one layer see. Example, rows of one document each: View(mask=None, causal=True)."""

    mask: Tensor | None  # [B|1,1,T,S] bool, True = sees; or numbers to add [B|1,N,T,S]; or what a plan's core wants
    causal: bool  # with mask None: keys up to the query's own place; else all
    documents: Documents | None = None  # in place of a mask: what a library for packed rows wants to know


class DocumentMask(nn.Module):
    """[B,1,T,T] bool from document_ids[B,T]: a token sees earlier tokens of its own document, itself included.

    Padding (id 0) sees padding, so that its rows stay finite; nothing real ever sees it. Without parameters, so that a
    plan can put here what its attention core wants to know instead.
    """

    def forward(self, document_ids: Tensor) -> Tensor:
        """See above."""
        return document_mask(document_ids)


def document_mask(document_ids: Tensor) -> Tensor:
    """See `DocumentMask`."""
    return within(document_ids).tril()


def within(document_ids: Tensor) -> Tensor:
    """[B,1,T,T] bool from document_ids[B,T]: a token sees all of its own document, padding padding."""
    return (document_ids.unsqueeze(2) == document_ids.unsqueeze(1)).unsqueeze(1)


def between(document_ids: Tensor, others: Tensor) -> Tensor:
    """[B,1,T,S] bool from document_ids[B,T] and others[B,S]: a token sees what of the other text has its own id, and
    padding sees all."""
    own = document_ids.unsqueeze(2)
    return ((own == others.unsqueeze(1)) | (own == 0)).unsqueeze(1)


def with_prefix(mask: Tensor, in_prefix: Tensor, document_ids: Tensor | None) -> Tensor:
    """`mask`[B|1,1,T,S], and the keys of in_prefix[B,S] in the query's own document (None: each row is one)."""
    first = in_prefix[:, None, None]
    return mask | (first if document_ids is None else first & within(document_ids))


def cache_mask(positions: Tensor, keys: int) -> Tensor:
    """[B,1,T,S] bool from positions[B,T]: the query at position p sees entries 0..p of its slot."""
    return (torch.arange(keys, device=positions.device) <= positions.unsqueeze(-1)).unsqueeze(1)


def triangle(length: int, device: torch.device) -> Tensor:
    """[1,1,T,T] bool: what `causal` says in words."""
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()


def near(mask: Tensor, places: Tensor, window: int) -> Tensor:
    """Of mask[B|1,1,T,S] the keys that stand less than `window` places before their query at places[B|1,T]."""
    reach = torch.arange(mask.shape[-1], device=mask.device) > (places - window).unsqueeze(-1)
    return mask & reach.unsqueeze(1)
