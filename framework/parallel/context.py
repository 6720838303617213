"""Context parallelism on plain collectives: c ranks share out the places of every row, attention still spans them all.

A row's T places are cut into 2c equal chunks, and rank r holds chunks r and 2c-1-r: under causal attention an early and
a late chunk together cost every rank the same. Two forms of attention over the cut rows, t = T/c places a rank, and
what a rank sends per layer:

  ring      (Liu et al. 2023, `ring.py`): k and v travel round; each rank adds a block at a time to a running softmax.
            forward   c-1 hops of 2 B t K H e bytes
            backward  c-1 hops of 2 B t K H e and c-1 hops of 2 B t K H a: dk and dv travel home behind k and v
  exchange  (Jacobs et al. 2023): all places of some heads for some places of all heads, and back.
            forward   2 all-to-alls, together (c-1)/c 2 B t (N + K') H e bytes
            backward  the same

for B rows, N heads, K key heads of H numbers (K' = max(K, c): fewer are repeated), e bytes a number, a = max(e, 4). The
ring takes any head counts and hides its hops behind the blocks. The exchange sends less where c K > N + K', and attends
by the fused kernel. Besides, a forward gathers document ids once, and what `join` and `last` need.

Left out: an exchange whose document mask is not held whole (B T T bools, built by each layer); strict mode.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cuda_ext.attention.op import attention
from framework.core.config import require
from framework.parallel.collectives import Ranks
from framework.parallel.heads import check_heads


class Cut:
    """How rows lie over the context ranks, head-tail. Example, c=2 and T=8: rank 0 holds places 0 1 6 7, rank 1 the
    places 2 3 4 5. With one rank everything is the identity."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def cut(self, x: Tensor, rank: int | None = None) -> Tensor:
        """x[B,T,...] -> [B,t,...]: the places of this rank, or of another. UsageError where T is no multiple of 2c."""
        size, rank = self.ranks.size, self.ranks.rank if rank is None else rank
        if size == 1:
            return x
        chunks, length = 2 * size, x.shape[1]
        require(
            length % chunks == 0,
            f"rows of {length} places cannot be cut over parallel.context={size} ranks: that takes a multiple of "
            f"{chunks}; pad them to {-(-length // chunks) * chunks}",
        )
        parts = x.chunk(chunks, dim=1)
        return torch.cat([parts[rank], parts[chunks - 1 - rank]], dim=1)

    def places(self, length: int, rank: int | None = None, device: torch.device | None = None) -> Tensor:
        """[t] int64: where in rows of `length` places this rank's stand, or another's."""
        return self.cut(torch.arange(length, device=device).unsqueeze(0), rank).squeeze(0)

    def join(self, x: Tensor) -> Tensor:
        """x[B,t,...] -> [B,T,...] in row order, on every rank. Each then computes the same loss from it, so that a
        rank's gradient is what stands at its own places: nothing is summed."""
        return _Join.apply(x, self)

    def last(self, hidden: Tensor, document_ids: Tensor) -> Tensor:
        """hidden[B,t,D], document_ids[B,t] -> [B,D]: the state of each whole row's last real token (id > 0; place 0
        where all is padding), zeros where another rank holds that place. What is made of it, linearly, adds up."""
        places = self.places(hidden.shape[1] * self.ranks.size, device=hidden.device)
        latest = torch.where(document_ids > 0, places, 0).amax(dim=1)
        latest = self.ranks.largest(latest, "the last places of rows")
        held = places == latest.unsqueeze(1)
        mine = hidden[torch.arange(len(hidden), device=hidden.device), held.int().argmax(dim=1)]
        return mine.where(held.any(dim=1, keepdim=True), 0)

    def by_rank(self, x: Tensor) -> Tensor:
        """x[B,T,...] -> [c,B,t,...]: every rank's places."""
        return torch.stack([self.cut(x, rank) for rank in range(self.ranks.size)])

    def in_row_order(self, parts: Tensor) -> Tensor:
        """[c,B,t,...] -> [B,T,...]: undoes `by_rank`."""
        heads, tails = (half.unbind() for half in parts.tensor_split(2, dim=2))
        return torch.cat([*heads, *reversed(tails)], dim=1)


class WholeIds(nn.Module):
    """The document ids of whole rows, which both cores take as their mask. One gather a forward."""

    def __init__(self, cut: Cut):
        super().__init__()
        self.cut = cut

    def forward(self, document_ids: Tensor) -> Tensor:
        """document_ids[B,t] -> [B,T] in row order."""
        return self.cut.join(document_ids)


class ExchangeCore(nn.Module):
    """Attention over whole rows for this rank's share of the heads: one all-to-all there, one back."""

    def __init__(self, cut: Cut):
        super().__init__()
        self.cut = cut

    @torch.compiler.disable(reason="collectives stand outside of compiled graphs")
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q[B,t,N,H], k and v[B,t,K,H] -> [B,t,N,H], causal within documents. `mask` is what WholeIds gave; None: each
        row is one document. UsageError where the heads cannot be shared out."""
        size = self.cut.ranks.size
        check_heads(q.shape[2], k.shape[2], size)
        copies = max(1, size // k.shape[2])
        k, v = k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2)
        shares = [x.unflatten(2, (size, -1)) for x in (q, k, v)]  # [B,t,c,heads,H]
        parts = _Exchange.apply(torch.cat(shares, dim=3).movedim(2, 0), self.cut.ranks)
        q, k, v = self.cut.in_row_order(parts).split([share.shape[3] for share in shares], dim=2)
        y = attention(q, k, v, mask=_document_mask(mask), causal=mask is None)
        return _Exchange.apply(self.cut.by_rank(y), self.cut.ranks).movedim(0, 2).flatten(2, 3)


def _document_mask(ids: Tensor | None) -> Tensor | None:
    """[B,1,T,T] from the ids of whole rows [B,T]."""
    if ids is None:
        return None
    places = torch.arange(ids.shape[1], device=ids.device)
    return sees(ids, places, ids, places).unsqueeze(1)


def sees(ids: Tensor, places: Tensor, key_ids: Tensor, key_places: Tensor) -> Tensor:
    """[B,t,s] bool: a query sees keys of its own document, up to its own place; padding (id 0) sees padding."""
    return (ids.unsqueeze(2) == key_ids.unsqueeze(1)) & (key_places <= places.unsqueeze(1))


class _Exchange(torch.autograd.Function):
    """[c,...] -> [c,...]: part r goes to rank r. Backward sends the gradients back, which is the same exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.exchange(x, "attention heads")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(grad, ctx.ranks), None


class _Join(torch.autograd.Function):
    """See `Cut.join`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return cut.in_row_order(cut.ranks.gather(x, "rows that context ranks share"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.cut.cut(grad), None
