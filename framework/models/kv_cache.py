"""Keys and values of tokens already read, for decoding one token at a time: fixed slots of fixed length.

A slot holds one sequence. Entry p of a slot belongs to the token at position p, and a query at position p sees entries
0..p. That one rule is the whole bookkeeping: there are no lengths to keep, a slot is refilled by writing a new sequence
from position 0, and what an earlier sequence, or the padding behind a prompt, left further on is overwritten before
anything sees it.

    cache = KVCache(config, slots=4, length=128)
    # prefill slots 2 and 0 with two prompts of 3 and 5 tokens, padded on the right
    hidden = model(prompts[2,5], positions=torch.arange(5).expand(2, 5), cache=cache.view(torch.tensor([2, 0])))
    first = hidden[[0, 1], [2, 4]]                    # the state behind each prompt's last real token
    # one token for every slot, each at its own position
    hidden = model(tokens[4,1], positions=lengths[:, None], cache=cache.view())
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from framework.models.config import ModelConfig


class KVCache:
    """Zeros at first; `length` is rounded up to a multiple of 8 (strict mode's padding of keys)."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.slots = slots
        self.length = -(-length // 8) * 8
        shape = (config.num_layers, slots, self.length, config.kv_heads, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def view(self, slots: Tensor | None = None, used: int | None = None) -> "CacheView":
        """The slots that a forward reads and writes, row b of its tokens being slot slots[b] (int64, no repeats); all
        slots in order where None. `used`: every position of that forward is below it, so that attention may stop there
        (strict mode goes on to `length` all the same)."""
        return CacheView(self, slots, self.length if used is None else min(used, self.length))


@dataclass(frozen=True)
class CacheView:
    """Some slots of a cache, as one forward sees them."""

    cache: KVCache
    slots: Tensor | None
    used: int

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, used: int) -> tuple[Tensor, Tensor]:
        """Write k and v[B,T,K,H] of the tokens at positions[B,T]; return the first `used` entries of the view's slots,
        both [B,used,K,H]. A position at or beyond the cache's length is an IndexError."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        slots = torch.arange(len(k), device=k.device) if self.slots is None else self.slots
        place = (slots.unsqueeze(1), positions)
        keys[place] = k.to(keys.dtype)
        values[place] = v.to(values.dtype)
        if self.slots is None:
            return keys[:, :used], values[:, :used]
        return keys[slots, :used], values[slots, :used]
