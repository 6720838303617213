"""Rows for new tokens: an embedding or head of a larger vocabulary, each new row the mean of the rows that spelled it.

So a new token begins as what the model knew of its text (`tokenization.extend` says which old ids that was), and not as
noise that the first steps must undo. Left out: reading and writing folders (`hub`), and biases, which are drawn alike.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from framework.core.errors import UsageError


def resized(weight: Tensor, sub_pieces: Mapping[int, Sequence[int]]) -> Tensor:
    """`weight[V, D]` (or `[V]`, a bias) with the rows of new ids: [V', D], V' = max(V, largest new id + 1).

    Row i of a new id is the mean of weight[j] over its sub-pieces j, one that stands twice counted twice, taken in at
    least fp32; all other rows keep their bits. A new id below V (a padded row) is drawn anew. Ids between that are
    neither old nor new cannot be filled: UsageError, as for a sub-piece that `weight` does not have.
    """
    size = max([len(weight), *(index + 1 for index in sub_pieces)])
    unfilled = sorted(set(range(len(weight), size)) - sub_pieces.keys())
    if unfilled:
        raise UsageError(f"id {unfilled[0]} is neither one of the {len(weight)} old rows nor has it sub-pieces")
    grown = torch.cat([weight, weight.new_zeros(size - len(weight), *weight.shape[1:])])
    exact = torch.promote_types(weight.dtype, torch.float32)
    for index, parts in sub_pieces.items():
        if not parts or not all(0 <= part < len(weight) for part in parts):
            raise UsageError(f"id {index}: its sub-pieces {list(parts)} must be some of the {len(weight)} old rows")
        grown[index] = weight[list(parts)].to(exact).mean(0).to(weight.dtype)
    return grown
