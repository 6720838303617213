"""Attention for the model: flash-attn where it is installed and fits, torch's fused kernels, or the explicit reference
where bits must not depend on the batch."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext import dispatch
from cuda_ext.attention import flash, reference
from cuda_ext.attention.documents import Documents
from cuda_ext.implementation import Implementation

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

_ROWS = 8  # a CPU matmul gives a row the same bits in any batch once rows come in eights (law On-policy)
_VARLEN = Implementation("torch varlen_attn", "packed rows, without a mask", kernel=True)
_CHOSEN = Implementation("reference", "ops.attention=reference")
_WORDS = {"scale", "window_size", "enable_gqa"}  # that varlen_attn must take


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    documents: Documents | None = None,
    causal: bool = False,
    scale: float | None = None,
    cap: float = 0.0,
    strict: bool = False,
) -> Tensor:
    """See `reference.attention`. q[B,T,N,H], k and v[B,S,K,H] -> [B,T,N,H].

    documents, in place of a mask and with S = T: a query sees what `documents.mask` says.
    strict: the same bits for a query whatever else is in the batch, given equal S up to the next multiple of 8 and H a
    multiple of 8 (else a CPU matmul's bits depend on where a row starts).
    """
    found = None if strict or mask is not None else _library(q, k, v, cap, causal, documents is not None)
    if found is not None:
        return _by_library(found, q, k, v, documents, causal, scale, cap)
    if documents is not None:
        mask, causal = documents.mask(len(q), q.shape[1], causal), False
    if strict:
        dispatch.announce("attention", dispatch.STRICT)
        return _padded_reference(q, k, v, mask, causal, scale, cap)
    if cap or dispatch.preferred("attention") == "reference":  # no fused kernel of torch's has a cap
        dispatch.announce("attention", dispatch.REFERENCE if cap else _CHOSEN)
        return reference.attention(q, k, v, mask=mask, causal=causal, scale=scale, cap=cap)
    if q.shape[1] == 1 and q.device.type == "cpu" and not causal:
        dispatch.announce("attention", dispatch.ONE_QUERY)
        return _one_query(q, k, v, mask, scale)
    dispatch.announce("attention", _sdpa(q, mask, cap))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if mask is not None and causal:
        mask, causal = reference.visible(mask, True, mask), False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def takes_documents(device: torch.device, dtype: torch.dtype, size: int, cap: float) -> bool:
    """Whether queries of `dtype` with heads of `size` numbers need no mask to stay within documents: on a GPU, where a
    library takes packed rows."""
    return _served(device, dtype, size, cap, packed=True) is not None


def _library(
    q: Tensor, k: Tensor, v: Tensor, cap: float, causal: bool, packed: bool
) -> flash.Version | Implementation | None:
    """What takes this call; None: what is there without libraries. A causal one of theirs ends where the keys end."""
    if flash.card(q.device) is None or not q.numel() or (causal and q.shape[1] != k.shape[1]):
        return None
    if not (q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]):
        return None
    return _served(q.device, q.dtype, q.shape[-1], cap, packed)


def _served(
    device: torch.device, dtype: torch.dtype, size: int, cap: float, packed: bool
) -> flash.Version | Implementation | None:
    card, wanted = flash.card(device), dispatch.preferred("attention")
    if card is None or wanted == "reference":
        return None
    if wanted != "torch":
        found = flash.pick(card, dtype, size, cap > 0, torch.are_deterministic_algorithms_enabled())
        if isinstance(found, flash.Version):
            return found
    return _VARLEN if packed and not cap and varlen_takes(card, dtype, size) else None


@torch.compiler.assume_constant_result
def varlen_takes(card: flash.Card, dtype: torch.dtype, size: int) -> bool:
    """Whether torch has a function for packed rows that takes heads of `size` numbers of `dtype` on this card."""
    if varlen_attn is None or not inspect.signature(varlen_attn).parameters.keys() >= _WORDS:
        return False
    return card >= (8, 0) and flash.is_half(dtype) and size % 8 == 0 and 8 <= size <= 256


def _by_library(
    found: flash.Version | Implementation,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None,
    causal: bool,
    scale: float | None,
    cap: float,
) -> Tensor:
    if isinstance(found, flash.Version):
        dispatch.announce("attention", found.runs)
        return (_by_flash_outside if found.opaque else by_flash)(found, q, k, v, documents, causal, scale, cap)
    assert documents is not None, "varlen_attn is for packed rows"
    dispatch.announce("attention", found)
    return by_varlen(q, k, v, documents, causal, scale)


def by_flash(
    version: flash.Version,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None,
    causal: bool,
    scale: float | None = None,
    cap: float = 0.0,
) -> Tensor:
    """Whole rows, or packed ones, by a version that is in LOADED. Positions of arguments differ between versions, names
    do not; some also give the log-sum-exp."""
    whole, packed = flash.LOADED[version.number]
    window, ahead = documents.window if documents is not None else 0, 0 if causal else version.unbounded
    words: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (window - 1, ahead) if window else (version.unbounded, version.unbounded),
        "softcap": cap,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if documents is None:
        y = whole(q, k, v, **words)
        return y[0] if isinstance(y, tuple) else y
    for side in "qk":
        words |= {f"cu_seqlens_{side}": documents.starts, f"max_seqlen_{side}": documents.longest}
    y = packed(*(x.flatten(0, 1) for x in (q, k, v)), **words)
    return (y[0] if isinstance(y, tuple) else y).unflatten(0, q.shape[:2])


_by_flash_outside = torch.compiler.disable(by_flash, reason="what this flash-attn calls cannot be traced")


def by_varlen(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, causal: bool, scale: float | None = None
) -> Tensor:
    """Packed rows by torch's own function for them."""
    assert varlen_attn is not None
    starts, longest = documents.starts, documents.longest
    window = (documents.window - 1, 0 if causal else -1)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    y: Tensor = varlen_attn(
        *packed, starts, starts, longest, longest, scale=scale, window_size=window, enable_gqa=grouped
    )
    return y.unflatten(0, q.shape[:2])


def _sdpa(q: Tensor, mask: Tensor | None, cap: float) -> Implementation:
    """What to say of torch's own; where flash-attn was asked for, also why."""
    if dispatch.preferred("attention") != "flash" or torch.compiler.is_compiling():
        return dispatch.SDPA
    card = flash.card(q.device)
    if mask is not None or card is None:
        return _instead("a mask is given" if card else "on a CPU")
    return _instead(str(flash.pick(card, q.dtype, q.shape[-1], cap > 0, torch.are_deterministic_algorithms_enabled())))


@functools.cache
def _instead(reason: str) -> Implementation:
    return Implementation(dispatch.SDPA.name, f"ops.attention=flash, but {reason}")


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Two batches of products, one a row and head of keys: a block of queries, as the fused kernel takes them, would be
    all but empty. Keys that lie by head, as in a cache, are not copied."""
    rows, keys, kv_heads, size = k.shape
    heads = q.shape[2]
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # [B K, S, H]
    q = q.reshape(rows * kv_heads, heads // kv_heads, size) * (scale or size**-0.5)
    scores = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, 1, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.bmm(weights.view(rows * kv_heads, heads // kv_heads, keys), v).view(rows, 1, heads, size)


def _padded_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, cap: float
) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    more_queries, more_keys = -queries % _ROWS, -keys % _ROWS
    seen = reference.visible(mask, causal, q.new_empty(queries, keys))
    if seen is None:
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
    shown, hidden = (True, False) if seen.dtype == torch.bool else (0.0, float("-inf"))
    seen = F.pad(seen, (0, more_keys), value=hidden)
    seen = F.pad(seen, (0, 0, 0, more_queries), value=shown)  # a query that sees nothing would be NaN, also backward
    q = F.pad(q, (0, 0, 0, 0, 0, more_queries))
    k, v = (F.pad(x, (0, 0, 0, 0, 0, more_keys)) for x in (k, v))
    return reference.attention(q, k, v, mask=seen, scale=scale, cap=cap)[:, :queries]
