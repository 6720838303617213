"""Which tokens a token sees: the one place where attention masks are made.

A query sees keys of its own document up to its own place, and through a window the last `window` of them. Left out:
encoders and prefixes, which see ahead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class View:
    """What the queries of one layer see. Example, rows of one document each: View(mask=None, causal=True)."""

    mask: Tensor | None  # [B|1,1,T,S] bool, True = sees; or numbers to add [B|1,N,T,S]; or what a plan's core wants
    causal: bool  # with mask None: keys up to the query's own place


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
    same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
    return same.tril().unsqueeze(1)


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
