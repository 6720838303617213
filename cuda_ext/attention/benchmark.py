"""Causal attention in bf16, whole rows and packed ones: what `attention` chooses beside torch's own, and beside every
flash-attn that is installed and fits the card; forward and backward."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cuda_ext import dispatch
from cuda_ext.attention import flash
from cuda_ext.attention.documents import Documents, find_documents
from cuda_ext.attention.op import attention, by_flash, by_varlen, varlen_takes
from cuda_ext.measure import Case, backward_of

_SIZES = [(4, 4096, 32, 8, 128), (1, 16384, 32, 8, 128)]
_DOCUMENTS = 16  # a row, of lengths 1, 2, .. 16 parts


def cases(device: str, sizes: list[tuple[int, int, int, int, int]] = _SIZES) -> Iterator[Case]:
    """Rows x places x heads x heads of keys x numbers a head. Operations: two products a pair of places that see each
    other, five in backward."""
    for rows, length, heads, groups, size in sizes:
        shapes = ((rows, length, n, size) for n in (heads, groups, groups))
        q, k, v = (torch.randn(shape, device=device).bfloat16() for shape in shapes)
        parts = torch.arange(1, _DOCUMENTS + 1).repeat_interleave(torch.arange(1, _DOCUMENTS + 1))
        ids = parts.repeat_interleave(-(-length // len(parts)))[:length].expand(rows, -1).to(device)
        documents, whole = find_documents(ids), rows * length * (length + 1) // 2
        assert documents is not None
        pairs = sum(n * (n + 1) // 2 for n in documents.starts.diff().tolist())
        name = f"{rows} x {length} x {heads}/{groups} x {size}"
        for kind, sides, seen in (
            ("whole", _whole(q), whole),
            ("packed", _packed(q, documents, documents.mask(rows, length, True)), pairs),
        ):
            flops = 4 * heads * size * seen
            calls = {side: partial(call, q, k, v) for side, call in sides.items()}
            yield Case(f"{kind} {name}", calls.pop("ours"), calls, flops=flops)
            dy = torch.randn_like(q)
            yield backward_of(f"{kind}, backward {name}", sides, (q, k, v), (dy,), flops=5 * flops // 2)


def _whole(q: Tensor) -> dict[str, Callable[..., Any]]:
    flashes = {str(version): partial(by_flash, version, documents=None, causal=True) for version in _versions(q)}
    return {"ours": partial(attention, causal=True), "SDPA": partial(_sdpa, causal=True), **flashes}


def _packed(q: Tensor, documents: Documents, mask: Tensor) -> dict[str, Callable[..., Any]]:
    told: dict[str, Any] = {"documents": documents, "causal": True}
    sides: dict[str, Callable[..., Any]] = {"ours": partial(attention, **told), "SDPA, mask": partial(_sdpa, mask=mask)}
    card = flash.card(q.device)
    if card is not None and varlen_takes(card, q.dtype, q.shape[-1]):
        sides["varlen_attn"] = partial(by_varlen, **told)
    return sides | {str(version): partial(by_flash, version, **told) for version in _versions(q)}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Tensor:
    with dispatch.preferring(attention="torch"):
        return attention(q, k, v, **told)


def _versions(q: Tensor) -> list[flash.Version]:
    card = flash.card(q.device)
    return [] if card is None else flash.every(card, q.dtype, q.shape[-1])
