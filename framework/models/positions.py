"""How tokens know their place: the cosines and sines of rotary embedding, the slopes of linear biases, the buckets of
relative ones, computed where and when they are used.

No table of positions is stored: nothing to keep in step with a longer context. Dynamic NTK scaling goes by the length
of each document, where transformers goes by the longest row of a batch: a token's state then depends on how long its
own document is, on nothing that comes after it, and on no other document.
"""

import math

import torch
from torch import Tensor, nn

from cuda_ext.rotary.op import rotary
from framework.models.config import Architecture, ModelConfig, RopeScaling, Scaling


def rotary_tables(
    positions: Tensor, config: ModelConfig, dtype: torch.dtype, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [B|1,T,R], of positions[B|1,T] times the frequencies, both halves alike; R = config.turned_size.
    lengths[B|1,T|1] of the tokens' documents count for a dynamic scaling; None: no longer than its original context.

    In at least fp32. Angles are taken in fp64: in fp32 an angle at position 100,000 is off by 0.004, and the bits of
    a cosine would depend on its place in the buffer.
    """
    angles = positions.unsqueeze(-1).double() * frequencies(config, positions.device, lengths)
    wide, sharpness = torch.promote_types(dtype, torch.float32), _sharpness(config.rope_scaling)
    cos, sin = (angles.cos() * sharpness).to(wide), (angles.sin() * sharpness).to(wide)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def frequencies(config: ModelConfig, device: torch.device | str = "cpu", lengths: Tensor | None = None) -> Tensor:
    """[R/2] fp64: the angle by which pair i turns from one position to the next, theta^(-2i/R), scaled; by lengths[...]
    of documents, where the scaling is dynamic, [...,R/2]."""
    size, scaling = config.turned_size, config.rope_scaling
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=device) / size
    plain = config.rope_theta**-exponents
    if scaling.kind is Scaling.DYNAMIC:
        return plain if lengths is None else _by_length(plain, exponents, lengths.unsqueeze(-1), config)
    if scaling.kind is Scaling.NONE:
        return plain
    kept = _kept(plain, config)
    return plain * kept + plain / scaling.factor * (1 - kept)


def _by_length(plain: Tensor, exponents: Tensor, lengths: Tensor, config: ModelConfig) -> Tensor:
    """Dynamic NTK (bloc97 and emozilla 2023), lengths[...,1] -> [...,R/2]: a base that grows with a document beyond the
    original context L0, theta' = theta (factor L / L0 - factor + 1)^(R/(R-2)), and plain frequencies up to there."""
    scaling, size = config.rope_scaling, config.turned_size
    stretch = scaling.factor * lengths.double() / scaling.original_positions - (scaling.factor - 1)
    base = config.rope_theta * stretch.clamp(min=1) ** (size / (size - 2))
    return torch.where(lengths > scaling.original_positions, base**-exponents, plain)


def _kept(plain: Tensor, config: ModelConfig) -> Tensor:
    """[R/2] in 0..1: how much of each frequency stays as it was."""
    scaling = config.rope_scaling
    slow, fast = scaling.slow, scaling.upper
    if scaling.kind is Scaling.LINEAR:
        return torch.zeros_like(plain)
    if scaling.kind is Scaling.LLAMA3:
        turns = scaling.original_positions * plain / (2 * math.pi)
        return ((turns - slow) / (fast - slow)).clamp(0, 1)
    # YaRN blends by index, between the indices (whole ones) that turn `fast` and `slow` times
    first, last = (
        config.turned_size
        * math.log(scaling.original_positions / (turns * 2 * math.pi))
        / (2 * math.log(config.rope_theta))
        for turns in (fast, slow)
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), config.turned_size - 1)
    index = torch.arange(len(plain), dtype=torch.float64, device=plain.device)
    return 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)


def _sharpness(scaling: RopeScaling) -> float:
    if scaling.kind is not Scaling.YARN:
        return 1.0
    return scaling.sharpness or 1 + math.log(scaling.factor) / 10


def turn(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool, parts: int = 1) -> Tensor:
    """Rotary embedding of the first R numbers of each head: x[B,T,N,H], tables[B|1,T,R] -> [B,T,N,H]. In two parts,
    each half of a head by its own half of the tables.

    interleaved: numbers 2i and 2i+1 turn together. They are brought to i and i+R/2 and left there: q and k alike, so
    that their products are the same.
    """
    if parts == 2:
        halves = zip(x.chunk(2, -1), *(table.chunk(2, -1) for table in tables), strict=True)
        return torch.cat([turn(half, (cos, sin), interleaved) for half, cos, sin in halves], dim=-1)
    size = tables[0].shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        turned = torch.cat((turned[..., ::2], turned[..., 1::2]), dim=-1)
    turned = rotary(turned, *tables)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def alibi_slopes(heads: int) -> list[float]:
    """Press et al. 2022, section 3: 2^(-8i/n) for i = 1..n, n a power of two; else those of the power of two below,
    and then every other one of the power above."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]


class Sinusoids(nn.Module):
    """Fixed vectors, even numbers sin(p / 10000^(2i/D)) and odd ones cos (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, positions: Tensor) -> Tensor:
        """positions[B|1,T] -> [B|1,T,D] in fp64: they are added to what the embedding gives, in its dtype."""
        exponents = torch.arange(0, self.size, 2, dtype=torch.float64, device=positions.device) / self.size
        angles = positions.unsqueeze(-1).double() * 10000.0**-exponents
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.size]


class Alibi(nn.Module):
    """Turns what a query sees into numbers to add to its scores. Without parameters, so that a plan can put here one
    for some of the heads: those from `first` on, `count` of them."""

    def __init__(self, heads: int, first: int = 0, count: int = 0):
        super().__init__()
        self.slopes = alibi_slopes(heads)[first : first + (count or heads)]

    def forward(self, seen: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
        """seen[B|1,1,T,S] bool, places[B|1,T] of the queries among the keys -> [B|1,N,T,S]: -slope x distance where
        a key is seen, -inf elsewhere."""
        distances = torch.arange(seen.shape[-1], device=seen.device) - places.unsqueeze(-1)
        slopes = torch.tensor(self.slopes, dtype=torch.promote_types(dtype, torch.float32), device=seen.device)
        bias = slopes.view(-1, 1, 1) * distances.unsqueeze(1)
        return bias.masked_fill(~seen, float("-inf")).to(dtype)


class RelativeBias(nn.Module):
    """Turns what a query sees into numbers to add to its scores: one a head and bucket of distances, learned (Raffel et
    al. 2020, section 2.1). Heads are read off the weight's shape, weight[buckets, N]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads))
        self.both_ways = config.architecture is Architecture.ENCODER
        self.farthest = config.relative_distance

    def forward(self, seen: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
        """seen[B|1,1,T,S] bool, places[B|1,T] of the queries among the keys -> [B|1,N,T,S]: the number of each key that
        is seen, -inf elsewhere."""
        distances = torch.arange(seen.shape[-1], device=seen.device) - places.unsqueeze(-1)
        bucket = relative_buckets(distances, len(self.weight), self.farthest, self.both_ways)
        bias = self.weight[bucket].permute(0, 3, 1, 2).to(dtype)
        return bias.masked_fill(~seen, float("-inf"))


def relative_buckets(distances: Tensor, buckets: int, farthest: int, both_ways: bool) -> Tensor:
    """The bucket of each distance, int64 of any shape, a key's place less its query's: half of the buckets hold one
    distance each, the others wider and wider ranges up to `farthest`. both_ways: half of all are for keys ahead, else a
    key ahead counts as at 0. Logarithms are in fp32, with which the published weights were trained."""
    if both_ways:
        buckets //= 2
    behind = distances.abs() if both_ways else (-distances).clamp(min=0)
    exact = buckets // 2
    ratio = behind.clamp(min=1).float() / exact
    wide = exact + (ratio.log() / math.log(farthest / exact) * (buckets - exact)).long()
    found = torch.where(behind < exact, behind, wide.clamp(max=buckets - 1))
    return found + buckets * (distances > 0) if both_ways else found
