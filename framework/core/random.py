"""Counter-based random numbers: a drawn number is a pure function of (seed, name, coordinates), never of history.

Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), vectorised over coordinates. It
carries the laws Init, Order and Sampling: any shard, rank or restart draws its own part alone and gets the same bits.
Only integer operations, one product and one sum of doubles are used after the bits, so vector width, thread count and
position in a buffer cannot change a result; that is why normals come from a table and not from log and cosine.
No generator state exists here, and none needs saving.
"""

import functools
import hashlib
import statistics
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_FEISTEL_ROUNDS = 10
_KNOTS = 1 << 14

Key = tuple[int, int]


def key(seed: int, name: str) -> Key:
    """The two 32-bit Philox key words of (seed, name): a 64-bit hash, so names need no numbering."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(key: Key, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10. `counter`: four int64 tensors of 32-bit words, broadcastable; returns four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(key: Key, index: Tensor, sample: Tensor | int = 0, position: Tensor | int = 0) -> Tensor:
    """Float64 in [0, 1) with 53 random bits, one per broadcast element of the int64 coordinates.

    `index` has 64 bits (an element, a row of a stream); `sample` and `position` have 32 each.
    """
    high, low = _words(key, index, sample, position)
    return ((high >> 5) * (1 << 26) + (low >> 6)).double() * 2.0**-53


def normal(key: Key, index: Tensor) -> Tensor:
    """Float64 standard normals by inverse CDF: linear between 2**14 quantiles, so truncated at 4.0 standard deviations.

    A normal from a table of quantiles differs from a true one by less than 1e-3 in variance (tested).
    """
    high, low = _words(key, index, 0, 0)
    cell = high >> 18
    within = (((high & 0x3FFFF) << 32) | low).double() * 2.0**-50
    quantiles = _quantiles(index.device)
    left = quantiles[cell]
    return left + within * (quantiles[cell + 1] - left)


def signs(key: Key, index: Tensor) -> Tensor:
    """[4, N] int8 of -1 and 1: four fair signs for each int64 of `index` [N]. 32 neighbours share a draw, and all
    between the least and the greatest are drawn, so they should be near each other."""
    first, last = (int(end) >> 5 for end in index.aminmax())
    cells = torch.arange(first, last + 1, device=index.device)
    nothing = torch.zeros_like(cells)
    words = torch.stack(philox(key, (cells & _MASK, (cells >> 32) & _MASK, nothing, nothing))).to(torch.int32)
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=index.device)).to(torch.int8) & 1
    return (bits.view(4, -1) * 2 - 1).index_select(1, index - (first << 5))


def shuffled(seed: int, name: str, size: int, positions: np.ndarray) -> np.ndarray:
    """Entry r of a permutation of range(size) for each r in `positions` (int64), without making the permutation.

    A Feistel network over the next even power of two, walked until it lands inside: O(1) memory however long the
    stream, and row r needs no other row (law Order). Four rounds would do for long streams, but leave neighbours of
    short ones (a PPO minibatch's rows) together far too often; from eight on no bias is measured (tested).
    """
    if size <= 1:
        return np.zeros_like(positions)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = tuple(word for pair in range(_FEISTEL_ROUNDS // 2) for word in key(seed, f"{name}:{pair}"))
    result = _feistel(positions.astype(np.uint64), half, round_keys)
    outside = result >= size
    while outside.any():
        result[outside] = _feistel(result[outside], half, round_keys)
        outside = result >= size
    return result.astype(np.int64)


def shuffled_stream(seed: int, name: str, size: int, start: int = 0) -> Iterator[int]:
    """Entries start, start+1, ... of the endless stream that visits range(size) once an epoch, reshuffled each time."""
    position = start
    while True:
        epoch, within = divmod(position, size)
        yield int(shuffled(seed, f"{name}:{epoch}", size, np.array([within]))[0])
        position += 1


def _words(key: Key, index: Tensor, sample: Tensor | int, position: Tensor | int) -> tuple[Tensor, Tensor]:
    i, s, p = torch.broadcast_tensors(
        index, torch.as_tensor(sample, device=index.device), torch.as_tensor(position, device=index.device)
    )
    high, low, _, _ = philox(key, (i & _MASK, (i >> 32) & _MASK, s & _MASK, p & _MASK))
    return high, low


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of the 64-bit product, by 16-bit halves: int64 has no unsigned product."""
    low_product = (word & 0xFFFF) * multiplier
    high_product = (word >> 16) * multiplier + (low_product >> 16)
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


@functools.cache
def _quantiles(device: torch.device) -> Tensor:
    inverse = statistics.NormalDist().inv_cdf
    inner = [inverse(i / _KNOTS) for i in range(1, _KNOTS // 2)]
    edge = [inverse(0.5 / _KNOTS)]
    below = edge + inner
    return torch.tensor([*below, 0.0, *(-x for x in reversed(below))], dtype=torch.float64, device=device)


def _feistel(values: np.ndarray, half: int, round_keys: tuple[int, ...]) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for word in round_keys:
        left, right = right, left ^ (_mix(right ^ np.uint64(word)) & mask)
    return (left << np.uint64(half)) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
