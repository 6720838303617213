"""Where documents begin in packed rows: what attention for packed rows wants to know in place of a mask."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Rows one behind another, cut into documents. Example, rows [1 1 2 0] and [1 1 1 1]:
    Documents(starts=tensor([0, 2, 3, 4, 8]), longest=4)."""

    starts: Tensor  # [n+1] int32, the last is B*T; equal ones are empty documents
    longest: int  # places; no document has more
    window: int = 0  # how many keys back a query sees, its own place counted; 0 = all of its document

    def mask(self, rows: int, length: int, causal: bool) -> Tensor:
        """[B,1,T,T] bool, True where a query sees a key: the definition."""
        places = torch.arange(rows * length, device=self.starts.device)
        of = torch.searchsorted(self.starts, places.to(self.starts.dtype), right=True).view(rows, 1, length)
        seen = of.transpose(1, 2) == of
        back = torch.arange(length, device=seen.device).unsqueeze(1) - torch.arange(length, device=seen.device)
        if causal:
            seen = seen & (back >= 0)
        if self.window:
            seen = seen & (back < self.window)
        return seen.unsqueeze(1)


def find_documents(document_ids: Tensor) -> Documents | None:
    """Of document_ids[B,T]: a run of equal ids is a document, padding (0) too. None where a document does not stand in
    one piece, for which a mask is needed.

    Waits for the device once. Of both numbers, n and longest, the next power of two: shapes come again, and a compiled
    graph with them.
    """
    rows, length = document_ids.shape
    total = rows * length
    if not 0 < total < 1 << 31:
        return None
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    numbers = torch.arange(1, total + 1, device=document_ids.device)
    starts = torch.searchsorted(begins.flatten().cumsum(0), numbers)  # of documents that are not there: total
    ends = torch.cat((starts[1:], starts.new_full((1,), total)))
    pieces = (begins & (document_ids != 0)).sum()
    facts = torch.stack((begins.sum(), (ends - starts).max(), pieces - _distinct(document_ids)))
    count, longest, in_pieces = facts.tolist()
    if in_pieces:
        return None
    starts = torch.cat((starts, starts.new_full((total,), total)))[: _power(count) + 1]
    return Documents(starts.int(), min(_power(longest), length))


def whole_rows(rows: int, length: int, device: torch.device) -> Documents:
    """Each row one document."""
    starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
    return Documents(starts, length)


def _distinct(document_ids: Tensor) -> Tensor:
    """How many documents the rows name, padding left out."""
    ids = document_ids.sort(1).values
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return (new & (ids != 0)).sum()


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
