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

Beside an encoder a slot also keeps the keys and values of what was read for it: they are written by the forward that is
given `encoder_tokens`, and seen by those that are not.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.core.config import require
from framework.models.config import ModelConfig, Position
from framework.models.positions import rotary_tables


class KVCache:
    """Zeros at first; `length` is rounded up to a multiple of 8 (strict mode's padding of keys).

    keys and values[layer][slot, K, S, H]: the entries of one head lie together, so that a product over them needs no
    copy; a tensor a layer, so that a compiled step writes in place. Every position's cosines and sines are made once.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        source_length: int = 0,
    ):
        """`source_length`: the longest text that an encoder reads for a slot; 0 where there is none."""
        require(
            (source_length > 0) == (config.encoder is not None),
            f"source_length={source_length} does not go with model.architecture={config.architecture}: what an encoder "
            "reads needs room, and without one there is nothing to keep",
        )
        self.slots = slots
        self.length = -(-length // 8) * 8

        def zeros(places: int) -> list[Tensor]:
            shape = (slots, config.kv_heads, places, config.head_size)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

        self.keys, self.values = zeros(self.length), zeros(self.length)
        self.source_keys, self.source_values = zeros(source_length), zeros(source_length)
        # a slot that holds nothing yet sees zeros: a row without any key would be NaN
        self.source_seen = torch.ones(slots, source_length, dtype=torch.bool, device=device)
        self.every = torch.arange(slots, device=device)
        self.heads = torch.arange(config.kv_heads, device=device).unsqueeze(1)
        self.rotary: tuple[Tensor, Tensor] | None = None  # cos, sin [S, R]
        if config.position is Position.ROTARY:
            # with dynamic scaling a longer text would turn what is kept anew: positions end where it begins
            original = config.rope_scaling.original_positions if config.scales_by_length else self.length
            places = torch.arange(min(self.length, original), device=device).unsqueeze(0)
            cos, sin = rotary_tables(places, config, dtype)
            self.rotary = (cos[0], sin[0])

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
    place: tuple[Tensor, Tensor, Tensor] | None = None  # where it writes [B, K, T], once `at` knows its positions

    def at(self, positions: Tensor) -> "CacheView":
        """This view for tokens at positions[B,T]."""
        return replace(self, place=(self._slots().view(-1, 1, 1), self.cache.heads, positions.unsqueeze(1)))

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """`rotary_tables` of positions[B,T], looked up: the same bits, for an angle is rounded from fp64."""
        return None if self.cache.rotary is None else (self.cache.rotary[0][positions], self.cache.rotary[1][positions])

    def extend(self, layer: int, k: Tensor, v: Tensor, used: int) -> tuple[Tensor, Tensor]:
        """Write k and v[B,T,K,H] of the tokens that `at` was told of; return the first `used` entries of the view's
        slots, both [B,used,K,H]. A position at or beyond the cache's length, or the original context of a dynamic
        scaling, is an IndexError."""
        return self._extended(self.cache.keys[layer], k, used), self._extended(self.cache.values[layer], v, used)

    def note_source(self, seen: Tensor) -> None:
        """Take note of which places of what an encoder has read count, seen[B,S] bool."""
        slots, length = self._slots(), self.cache.source_seen.shape[1]
        require(seen.shape[1] <= length, f"an encoder read {seen.shape[1]} places, the cache has room for {length}")
        self.cache.source_seen[slots] = F.pad(seen, (0, length - seen.shape[1]))

    def keep_source(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write k and v[B,S,K,H] of what an encoder has read."""
        slots = self._slots()
        for entries, new in ((self.cache.source_keys[layer], k), (self.cache.source_values[layer], v)):
            entries[slots, :, : new.shape[1]] = new.to(entries.dtype).transpose(1, 2)

    def kept_source(self, layer: int) -> tuple[Tensor, Tensor]:
        """What `keep_source` wrote for the view's slots, all of its places: both [B,S,K,H]."""
        both = (self.cache.source_keys[layer], self.cache.source_values[layer])
        k, v = both if self.slots is None else (x[self.slots] for x in both)
        return k.transpose(1, 2), v.transpose(1, 2)

    def seen_source(self) -> Tensor:
        """[B,S] bool: what `note_source` was told."""
        return self.cache.source_seen if self.slots is None else self.cache.source_seen[self.slots]

    def _slots(self) -> Tensor:
        return self.cache.every if self.slots is None else self.slots

    def _extended(self, entries: Tensor, new: Tensor, used: int) -> Tensor:
        assert self.place is not None, "a view must be told its positions first"
        entries[self.place] = new.to(entries.dtype).transpose(1, 2)
        seen = entries if self.slots is None else entries[self.slots]
        return seen[:, :, :used].transpose(1, 2)
